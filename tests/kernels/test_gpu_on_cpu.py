"""All of tests/gpu with small cases, and the commands of benchmarks/gpu.sh, without a GPU.

tests/gpu runs in a separate process, because the interpreter is chosen when a kernel is made.
"""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import tune
from elip_kernels._triton import HAS_TRITON
from tests.helpers.tiers import tiered

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


@pytest.mark.parametrize(("words", "least"), tiered([(HALF, 150), ((), 200)], []))
@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so there is no kernel to interpret")
def test_every_gpu_test_passes_on_small_cases(tmp_path, words, least):
    report = tmp_path / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, str(FOLDER)]
    command += [f"--junitxml={report}"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    cases = list(outcomes(report))
    skipped = {name: why for name, why in cases if why is not None}
    assert not skipped
    assert {name for name, _ in cases} == defined()
    assert len(cases) >= least


@pytest.fixture
def started(tmp_path):
    """Return a function that runs gpu.sh with a fake GPU and returns its Python commands."""
    stub = tmp_path / "python3"
    stub.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo "NVIDIA H100" && exit\nprintf "%s\\n" "$@" >>"$CALLS"\n'
    )
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(
        '#!/bin/sh\necho "$2" >>"$CALLS"\nuntil [ "$1" = python3 ]; do shift; done\nexec "$@"\n'
    )
    for each in (stub, sanitizer):
        each.chmod(0o755)

    def start(*words):
        calls = tmp_path / "calls"
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "OUT": str(tmp_path / "out"),
            "COMMIT": "0" * 40,
        }
        subprocess.run(["benchmarks/gpu.sh", *words], env=environment, cwd=ROOT, check=True)
        return calls.read_text().splitlines()

    return start


def test_gpu_sh_starts_tests_that_are_there(started):
    words = started("tests")
    assert words[:2] == ["-m", "pytest"] and words[-1] == "tests/gpu"
    assert words[words.index("-m", 1) + 1] == "gpu"


@pytest.mark.parametrize("tools", [["memcheck", "racecheck", "initcheck"], ["racecheck"]])
def test_gpu_sh_sanitizes_tests_that_are_there(started, tools):
    words = started("sanitize", *(tools if len(tools) == 1 else []))
    assert [word for word in words if word.endswith("check")] == tools
    assert words.count("tests/gpu/test_accuracy.py") == len(tools)
    names = words[words.index("-k") + 1].split(" or ")
    assert all(any(name in test for test in defined()) for name in names)


def test_gpu_sh_starts_a_sweep_with_options_that_it_has(started, monkeypatch):
    m, module, *words = started("tune")
    assert m == "-m" and find_spec(module).origin == tune.__file__
    seen = {}
    monkeypatch.setattr(tune, "ON_GPU", True)
    monkeypatch.setattr(tune, "tune", lambda sweeps, shapes, out, **options: seen.update(options))
    tune.main(words)
    assert seen == {"rounds": 11, "seconds": 440.0}


@pytest.mark.parametrize("words", [["bench"], ["bench", "tower"]])
def test_gpu_sh_starts_benchmarks_that_are_there(started, words):
    called = started(*words)
    files = [word for word in called if word.startswith("benchmarks/")]
    assert len(files) == len(set(files)) >= 1
    assert called[-3:-1] == ["-m", "benchmarks.predicted"] and called[-1] in called[-4]
    there = {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert set(files) == (there if words == ["bench"] else {"benchmarks/bench_tower.py"})
