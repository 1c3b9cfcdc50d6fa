"""Runs tests/interpreted in its own process: the interpreter is chosen when a kernel is made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elip_kernels._triton import HAS_TRITON

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret")
def test_kernels_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 60, run.stdout[-2000:]
