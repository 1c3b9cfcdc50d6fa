"""Runs that are killed, started twice, or meet a full disk: `python -m tests.interruptions`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.interruptions import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_ends_as_an_undisturbed_one(command):
    options = ["--kills", "6", "--moments", "3", "--only", command]
    run = subprocess.run(
        [sys.executable, "-m", "tests.interruptions", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "6 kills" in run.stdout and "3 full disks" in run.stdout
