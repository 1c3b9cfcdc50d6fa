"""benchmarks/gpu.sh without a GPU: its steps, and a whole run with injected faults."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from benchmarks import gpu_run, tune
from elip_kernels._triton import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "NVIDIA H100 80GB HBM3"
FAILED = "failed with exit status"


def steps(command):
    return gpu_run.steps(command, Path("out"), 90)


def files(command):
    return [word for step in steps(command) for word in step.words if word.endswith(".py")]


@pytest.mark.parametrize(
    ("command", "first", "pattern"),
    [
        ("tests", "tests/gpu/test_device.py", "tests/gpu/test_*.py"),
        ("bench", "benchmarks/bench_tower.py", "benchmarks/bench_*.py"),
    ],
)
def test_every_file_is_a_step(monkeypatch, command, first, pattern):
    monkeypatch.chdir(ROOT)
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
    assert files(command)[0] == first
    assert sorted(files(command)) == sorted(there)


def test_a_sweep_is_started_with_options_that_it_has(monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "ON_GPU", True)
    monkeypatch.setattr(
        tune, "tune", lambda sweeps, shapes, out, **options: seen.append((sweeps, out, options))
    )
    for step in steps("tune"):
        assert step.words[1:3] == ("-m", "benchmarks.tune")
        tune.main(step.words[3:])
    options = {"rounds": 11, "seconds": 60.0}
    assert seen == [([sweep], Path("out/tune.json"), options) for sweep in tune.SWEEPS]


def test_a_step_that_the_end_of_the_call_cuts_is_left(monkeypatch, tmp_path, capsys):
    """The second of two steps has less time than its limit; alone, it has all of it."""
    state, ran = {"outcomes": {}}, []
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: float(len(ran)))

    def finish(step, seconds):
        ran.append((step.name, seconds))
        return 0 if step.name == "a" else None

    monkeypatch.setattr(gpu_run, "finish", finish)
    todo = [gpu_run.Step(name, ()) for name in "ab"]
    options = SimpleNamespace(seconds=9, limit=9)
    for outcome in ("left", "failed: interrupted after 9 s"):
        assert gpu_run.run("tests", todo, tmp_path, state, options) == 1
        assert capsys.readouterr().out.splitlines()[-2:] == [
            "tests/a: passed",
            f"tests/b: {outcome}",
        ]
    assert ran == [("a", 9), ("b", 8), ("b", 9)]
    assert json.loads((tmp_path / "steps.json").read_text()) == state


WRONG = """
import pytest
pytestmark = pytest.mark.gpu

def test_row():
    assert 0.5 == pytest.approx(0.6)
"""
ENDLESS = """
import time, pytest
pytestmark = pytest.mark.gpu

def test_first():
    pass

def test_endless():
    time.sleep(600)
"""
RIGHT = "import pytest\npytestmark = pytest.mark.gpu\n\ndef test_right():\n    pass\n"
BENCH = """
import pytest, torch
from benchmarks.kernel_analysis.stub_device import stub_device
from elip_kernels._triton import tl, triton

@triton.jit
def _fill_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), 1.0)

@pytest.mark.parametrize("block", BLOCKS)
def test_fill(record, block):
    with stub_device():
        step = lambda: _fill_kernel[(1,)](torch.zeros(16), BLOCK=block)
        record(step, op="fill", ratios={"copy": 1.0})
"""
SWEEPS = 'SWEEPS = ["reduce.reduce_forward", "score_reduce.query", "score_reduce.move"]\n'
TUNE = """
import os, sys
name = sys.argv[-1]
with open(sys.argv[2], "a") as file:
    file.write(name + "\\n")
if name == "score_reduce.query":
    os.abort()
"""
TREE = {
    "tests/gpu/test_device.py": RIGHT,
    "tests/gpu/test_accuracy.py": WRONG,
    "tests/gpu/test_compiler.py": ENDLESS,
    "tests/gpu/test_tower.py": RIGHT,
    "benchmarks/bench_tower.py": BENCH.replace("BLOCKS", "[16]"),
    "benchmarks/bench_parts.py": BENCH.replace("BLOCKS", "[15, 8]"),  # 15 does not compile
    "benchmarks/sweeps.py": SWEEPS,
    "benchmarks/tune.py": TUNE,
    "bin/python3": f'#!/bin/sh\n[ "$1" = -c ] && echo "{DEVICE}" && exit\nexec "$PYTHON" "$@"\n',
    "bin/compute-sanitizer": '#!/bin/sh\n[ "$4" != racecheck ]\n',
}


@pytest.fixture
def started(tmp_path):
    """Return a function that runs gpu.sh in a small tree, and returns exit status and output."""
    left_out = shutil.ignore_patterns("bench_*", "results", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for each in (tmp_path / "bin").iterdir():
        each.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    own |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    own |= {"OUT": str(tmp_path / "out"), "COMMIT": "0" * 40}

    def start(*words, **more):
        command = [tmp_path / "benchmarks/gpu.sh", *words]
        run = subprocess.run(command, env=own | more, capture_output=True, text=True)
        return run.returncode, run.stdout

    return start


def outcomes(output):
    """Return the outcome of each step in the list at the end."""
    lines = [line.partition(": ") for line in output.splitlines()]
    return {name: end for name, _, end in lines if end.startswith(("passed", "failed", "left"))}


def ran(output):
    """Return the names of the steps that ran."""
    return [line.split()[1].strip(":") for line in output.splitlines() if line.startswith("=== ")]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so there is nothing to compile")
def test_a_run_with_a_wrong_result_a_timeout_and_a_compile_failure_goes_on(started, tmp_path):
    out = tmp_path / "out"
    assert outcomes(started("tests", "device")[1]) == {"tests/device": "passed"}
    status, output = started("tests", "--limit", "10")  # a process takes seconds to begin
    assert ran(output) == ["tests/accuracy", "tests/compiler", "tests/tower"]
    expected = {
        "tests/device": "passed",
        "tests/accuracy": f"{FAILED} 1",
        "tests/compiler": "failed: interrupted after 10 s",
        "tests/tower": "passed",
    }
    assert (status, outcomes(output)) == (1, expected)
    assert "FAILED tests/gpu/test_accuracy.py::test_row - assert 0.5 == 0.6" in output
    interrupted = ElementTree.parse(out / "test_compiler.xml").iter("testcase")
    assert "test_first" in {case.get("name") for case in interrupted}
    status, output = started("tests")
    assert (status, ran(output), outcomes(output)) == (1, [], expected)

    status, output = started("sanitize")
    expected = {"memcheck": "passed", "racecheck": f"{FAILED} 1", "initcheck": "passed"}
    assert status == 1
    assert outcomes(output) == {f"sanitize/{tool}": each for tool, each in expected.items()}

    assert started("tune", "reduce")[0] == 0
    status, output = started("tune")
    expected = {"reduce.reduce_forward": "passed", "score_reduce.query": f"{FAILED} -6"}
    expected = {f"tune/{name}": each for name, each in expected.items()}
    assert (status, outcomes(output)) == (1, expected | {"tune/score_reduce.move": "passed"})
    assert (out / "tune.json").read_text().split() == json.loads(SWEEPS.partition("= ")[2])

    assert started("bench", "tower")[0] == 0
    status, output = started("bench")
    assert ran(output) == ["bench/parts"]
    expected = {"tower": "passed", "parts": f"{FAILED} 1"}
    assert (status, outcomes(output)) == (1, {f"bench/{n}": each for n, each in expected.items()})
    assert "CompilationError" in output
    content = json.loads((out / "bench.json").read_text())
    assert [each["name"] for each in content["benchmarks"]] == ["test_fill[16]", "test_fill[8]"]
    failed = ["benchmarks/bench_parts.py::test_fill[15]"]
    assert content["run"] == {"planned": 3, "failed": failed, "missing": []}

    assert (out / "log.txt").read_text().endswith(output)
    status, output = started("bench", COMMIT="1" * 40)
    assert status != 0 and "OUT: expected results of" in output
