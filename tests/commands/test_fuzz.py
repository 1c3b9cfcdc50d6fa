"""A part of the hostile inputs of `python -m tests.fuzz`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


OF_MODELS = (
    "failed_ranks",
    "interrupts",
    "nested_models",
    "tars",
    "threads_in_contexts",
    "windows",
)
"""Kinds of cases that run models for seconds."""


def fuzz(count, *options):
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "0 failures" in run.stdout, run.stdout + run.stderr[-2000:]


def test_damaged_input_causes_no_traceback_and_no_loss_of_data():
    fuzz(40, "--without", *OF_MODELS)


@pytest.mark.slow
def test_models_in_models_threads_ranks_and_windows_give_right_results_or_an_error():
    fuzz(50, "--only", *OF_MODELS)
