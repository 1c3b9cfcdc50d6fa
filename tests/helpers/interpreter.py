"""Run files of tests/interpreted in a process: the interpreter is chosen when a kernel is made."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "interpreted"


def file(name):
    """Return the path of the tests of a kernel, such as `reduce_kernel`."""
    return str(FOLDER / f"test_{name}.py")


def check_passes(*words):
    """Check that pytest with these words finds tests and that all of them pass."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    run = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
