"""Runs that are killed, started twice, or meet a full disk: `python -m tests.interruptions`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.interruptions import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_interrupted_commands_end_as_undisturbed_ones():
    run = subprocess.run(
        [sys.executable, "-m", "tests.interruptions", "--kills", "6", "--moments", "3"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for met in ("6 kills", "3 full disks"):
        assert run.stdout.count(met) == len(COMMANDS), run.stdout
