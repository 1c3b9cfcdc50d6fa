"""All of tests/gpu with small cases, without a GPU.

It runs in a separate process, because the interpreter is chosen when a kernel is made.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from elip_kernels._triton import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests/gpu"
HALF = ("-k", "opcheck or not torch.float32")


def defined():
    """Return module::test of every test function under tests/gpu."""
    return {
        f"tests.gpu.{path.stem}::{node.name}"
        for path in FOLDER.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def outcomes(report):
    """Yield (module::test, reason of a skip or None) for every case of a JUnit report."""
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        name = f"{case.get('classname')}::{case.get('name').partition('[')[0]}"
        yield name, None if skipped is None else skipped.get("message")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret")
def test_every_gpu_test_passes_on_small_cases(tmp_path):
    report = tmp_path / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *HALF, str(FOLDER)]
    command += [f"--junitxml={report}"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    cases = list(outcomes(report))
    skipped = {name: why for name, why in cases if why is not None}
    assert not skipped
    assert {name for name, _ in cases} == defined()
