"""A part of the hostile files of `python -m tests.fuzz`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_damaged_files_cause_no_traceback_and_no_loss_of_data():
    command = [sys.executable, "-m", "tests.fuzz", "--count", "20", "--without", "tars"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "0 failures" in run.stdout, run.stdout + run.stderr[-2000:]
