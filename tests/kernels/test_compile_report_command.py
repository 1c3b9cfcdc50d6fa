"""The compile report as a command: tables, JSON, and failures of the compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elip_kernels._triton import HAS_TRITON, triton

if not HAS_TRITON:
    pytest.skip("triton is absent, so there is nothing to compile", allow_module_level=True)

from benchmarks.kernel_analysis import report
from elip_kernels.testing import REAL_CASES
from tests.kernels.test_compile_report import SIZE, compiled


@pytest.mark.exhaustive
def test_the_command_writes_a_table_and_json(tmp_path):
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.kernel_analysis", "report"]
    command += ["--arch", "90", "--only", "reduce", "--json", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(path.read_text())
    assert document["triton"] == triton.__version__
    rows = {(row["kernel"], row["N"], row["dtype"], row["arch"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 2 * len(REAL_CASES) * len(SIZE)
    for (kernel, N, dtype, _), row in rows.items():
        _, code = compiled("reduce", N, dtype)[kernel]
        assert (row["registers"], row["shared"]) == (code.registers, code.shared)
        assert [row["occupancy"], row["limit"]] == list(code.occupancy)
    header, *lines, versions = run.stdout.splitlines()
    assert header.split() == list(report.COLUMNS)
    assert len(lines) == len(rows) and triton.__version__ in versions
    assert rows["_reduce_fwd_kernel", 257, "bf16", 90]["B=32"] == 32 * 12


def refuse(launch, arch):
    raise RuntimeError("error: one\n\n  PassManager::run failed\n")


def crash(job):
    os._exit(1)


@pytest.mark.slow
def test_a_compile_failure_is_a_row(monkeypatch):
    job = report.Job("reduce", 2, 197, 127, "bf16", 90, 0)
    monkeypatch.setattr(report, "compile_launch", refuse)
    refused = report._compile(job)
    assert refused == {"error": "RuntimeError: PassManager::run failed"}
    monkeypatch.setattr(report, "_compile", crash)
    assert report._compile_in_subprocess(job) == {"error": "the compiler crashed"}
    header, line = report.table([{"kernel": "_reduce_fwd_kernel", "N": 197} | refused]).splitlines()
    assert header.split() == list(report.COLUMNS)
    assert line.endswith("-  RuntimeError: PassManager::run failed")


@pytest.mark.parametrize(("rows", "status"), [([{"kernel": "a"}], 0), ([{"error": "no"}], 1)])
def test_a_failure_is_the_exit_status(monkeypatch, capsys, rows, status):
    from benchmarks.kernel_analysis import __main__ as command

    monkeypatch.setattr(command, "report", lambda archs, calls: rows)
    monkeypatch.setattr(sys, "argv", ["benchmarks.kernel_analysis", "report", "--arch", "80"])
    assert command.main() == status
    assert triton.__version__ in capsys.readouterr().out
