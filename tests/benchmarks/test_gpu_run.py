"""benchmarks/gpu.sh without a GPU: its steps."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_run, tune

ROOT = Path(__file__).resolve().parents[2]


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
