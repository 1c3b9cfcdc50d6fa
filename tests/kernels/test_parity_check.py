"""`python -m elip_kernels.testing`: every public op, the table, and the exit status."""

import subprocess
import sys

import pytest
import torch

from elip_kernels.testing import __main__ as parity

CPU = torch.device("cpu")


def test_every_op_passes_on_the_cpu(capsys):
    assert parity.main(["--device", "cpu"]) == 0
    _, header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["op", "dtype", "runs", "error", "bound", "ok"]
    assert all(row.split()[2] == "PyTorch" and row.endswith("yes") for row in rows)
    assert total == f"{len(rows)} of {len(rows)} checks passed"


@pytest.mark.parametrize(("output", "changed"), [(0, 1e-3), (1, 1), (-1, float("nan"))])
def test_a_wrong_output_fails(monkeypatch, output, changed):
    run = parity._run

    def wrong(example, arguments):
        outputs, form = run(example, arguments)
        outputs[output].view(-1)[5] += changed
        return outputs, form

    monkeypatch.setattr(parity, "_run", wrong)
    *_, passed = parity.check("reduce", torch.float32, CPU, parity.SMALL_SHAPE)
    assert passed == "NO"


def test_an_op_that_raises_fails(monkeypatch, capsys):
    def broken(**arguments):
        raise RuntimeError("no kernel image is available")

    example = parity.EXAMPLES["reduce"]._replace(function=broken)
    monkeypatch.setattr(parity, "EXAMPLES", {"reduce": example})
    assert parity.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no kernel image is available" in out and "0 of 3 checks passed" in out


WITHOUT_TRITON = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
from elip_kernels._triton import HAS_TRITON
from elip_kernels.testing.__main__ import main
assert not HAS_TRITON
raise SystemExit(main([]))
"""


@pytest.mark.slow
def test_every_op_runs_without_triton():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "checks passed" in run.stdout and "kernels" not in run.stdout
