"""Run tests/interpreted in a process, because the interpreter is chosen when a kernel is made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elip_kernels._triton import HAS_TRITON

FOLDER = Path(__file__).parents[1] / "interpreted"
RANDOMISED = FOLDER / "test_randomised.py"
QUICK = [str(FOLDER / f"test_{of}.py") for of in ("reduce_kernel", "traffic")]
OTHERS = sorted({str(file) for file in FOLDER.glob("test_*.py")} - {*QUICK, str(RANDOMISED)})

pytestmark = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret"
)


def number_passed(*words):
    """Run pytest with these words; return the number of tests, all of which must pass."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    run = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return int(re.search(r"(\d+) passed", run.stdout)[1])


def test_kernels_under_the_interpreter():
    """These files run every kernel; the merging kernels run in `test_traffic`."""
    assert number_passed(*QUICK) >= 80


@pytest.mark.slow
def test_other_kernels_under_the_interpreter():
    assert number_passed("-m", "not slow and not exhaustive", *OTHERS) >= 100


@pytest.mark.exhaustive
def test_further_cases_under_the_interpreter():
    assert number_passed("-m", "slow or exhaustive", *QUICK, *OTHERS) >= 200


@pytest.mark.slow
def test_random_cases_under_the_interpreter():
    assert number_passed(str(RANDOMISED)) > 0
