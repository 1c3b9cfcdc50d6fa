"""The compile report as a command: its table, and failures of the compiler."""

import os
import sys

import pytest

from elip_kernels._triton import HAS_TRITON, triton

if not HAS_TRITON:
    pytest.skip("triton is absent, so there is nothing to compile", allow_module_level=True)

from benchmarks.kernel_analysis import report


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
    monkeypatch.setattr(sys, "argv", ["benchmarks.kernel_analysis", "--arch", "80"])
    assert command.main() == status
    assert triton.__version__ in capsys.readouterr().out
