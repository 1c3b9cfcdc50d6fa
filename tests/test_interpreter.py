"""Runs tests/interpreted in its own process: the interpreter is chosen when a kernel is made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elip_kernels._triton import HAS_TRITON

FOLDER = Path(__file__).parent / "interpreted"
RANDOMISED = "test_randomised.py"

pytestmark = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret"
)


def number_passed(*words):
    """Of the tests that pytest finds with these words, all of which must pass."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    run = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return int(re.search(r"(\d+) passed", run.stdout)[1])


def test_kernels_under_the_interpreter():
    assert number_passed(str(FOLDER), f"--ignore={FOLDER / RANDOMISED}") >= 60


@pytest.mark.slow
def test_further_cases_under_the_interpreter():
    words = ("-m", "slow", str(FOLDER), f"--ignore={FOLDER / RANDOMISED}")
    assert number_passed(*words) >= 60


@pytest.mark.slow
def test_random_cases_under_the_interpreter():
    assert number_passed(str(FOLDER / RANDOMISED)) > 0
