"""Benchmarks run at their smallest size; the tables of plot.py, and refused results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.plot import main

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PASSED = {"max_abs": 1e-7, "bound": 1e-6, "passed": True}


def entries():
    """Return one entry of each kind of benchmark."""
    common = {"parity": dict(PASSED), "rounds": 10, "dtype": "fp32"}
    op = common | {
        "op": "reduce",
        "direction": "forward",
        "milliseconds": {"official": 4.0, "eager": 2.0, "elip_kernels": 2.0, "copy": 1.0},
        "ratios": {"official": 0.5, "eager": 1.0},
        "possible": {"official": 0.25, "eager": 0.5, "elip_kernels": 0.5, "copy": 1.0},
        "bytes": 1000,
        "kernels": False,
        "left_out": {"compiled": "no compiler"},
        "shape": {"B": 64, "N": 257, "D": 768, "K": 166},
    }
    tower = common | {
        "op": "vit_base_patch16_224",
        "direction": "training",
        "milliseconds": {"dense": 1674.0, "last": 1230.0},
        "ratios": {"last": 0.735},
        "flops": {"dense": 100, "last": 71},
        "memory": {"dense": 100, "last": 69},
        "shape": {"B": 4, "image": 256},
    }
    strategies = common | {
        "op": "vit_small_patch16_224",
        "direction": "inference",
        "milliseconds": {"dense": 63.2, "tome": 50.0, "resize": 62.0},
        "ratios": {"tome": 0.791, "resize": 0.981},
        "strategies": {"tome": "tome(r=13)", "resize": "resize(size=176)"},
        "strategy_flops": {"dense": 1.0, "tome": 0.702, "resize": 0.61},
        "share": 0.702,
        "shape": {"B": 1, "image": 224},
    }
    caches = common | {
        "op": "llava caches",
        "strategy": "fastv:layer=2",
        "milliseconds": {"dynamic": 518.2, "static": 510.1, "compiled": 437.0},
        "ratios": {"dynamic": 1.0, "static": 0.991, "compiled": 0.837},
        "tokens": {"image": 576, "text": 48, "decoded": 16},
    }
    exported = common | {
        "op": "vit_small_patch16_224",
        "onnxruntime": "1.32.0",
        "milliseconds": {"dense": 41.2, "tome": 30.0, "PyTorch": 63.2},
        "ratios": {"tome": 0.728, "PyTorch": 1.534},
        "runtime_threads": 2,
        "shape": {"B": 1, "image": 224},
    }
    step = common | {
        "op": "albef",
        "direction": "training",
        "milliseconds": {"dense": 1500.0, "official": 1480.0, "last, shared": 1100.0},
        "ratios": {"official": 0.987, "last, shared": 0.733},
        "step_flops": {"dense": 1.0, "official": 0.884, "last, shared": 0.72},
        "memory": {"dense": 100, "official": 81, "last, shared": 80},
        "shape": {"B": 4, "image": 256},
        "width": 192,
    }
    unshared = {"ratios": {"official": 0.9}, "step_flops": {"dense": 1.0, "official": 0.88}}
    language = common | {
        "op": "llava",
        "direction": "prefill",
        "language_model": "diverse",
        "milliseconds": {"dense": 900.0, "0.25": 450.0},
        "ratios": {"0.25": 0.5},
        "cache_bytes": {"dense": 1000, "0.25": 310},
        "tokens": {"image": 576, "text": 48, "decoded": 16},
        "shape": {"B": 1, "image": 336},
    }
    steps = [step, step | {"op": "meter"} | unshared]
    return [op, tower, strategies, language, caches, exported, *steps]


@pytest.fixture
def page(tmp_path):
    """Return page(entries, **changes), which writes a page and results and returns arguments."""

    def write(entries, **changes):
        folder = tmp_path / "results" / "some-cpu"
        folder.mkdir(parents=True)
        machine = {"device": "Some CPU, 2 cores", "threads": 2, "versions": {"torch": "2.13.0"}}
        content = {
            "machine_info": machine,
            "commit_info": {"id": "0123456789", "dirty": False},
            "datetime": "2026-11-28T12:00:00+00:00",
            "run": {"planned": len(entries), "failed": [], "missing": []},
            "benchmarks": [{"name": entry["op"], "extra_info": entry} for entry in entries],
        }
        (folder / "bench.json").write_text(json.dumps(content | changes))
        file = tmp_path / "docs" / "benchmarks.md"
        file.parent.mkdir()
        file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
        return ["--results", str(folder.parent), "--page", str(file)]

    return write


def test_tables_come_from_the_json(page, tmp_path):
    arguments = page(entries())
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    text += (tmp_path / "docs" / "some-cpu-ops.md").read_text()
    for part in (
        "### Some CPU, 2 cores",
        "Measured on 2026-11-28 at commit 0123456; CPU threads: 2; torch 2.13.0.",
        "| `reduce` forward | B64 N257 D768 K166 fp32 | 2 | 0.50 | 1.00 no gain | – | 50% |",
        "| vit_base_patch16 256 px, 4, fp32 | training | 1674 | 0.73 (0.71) | 0.69 |",
        "| vit_small_patch16 224 px, 1, fp32 | inference | 63.2 | 0.79 (0.70) | 0.98 no gain (",
        "0.702 of a dense training step",
        "`tome(r=13)`",
        "[Language models](vlm.md#how-much-time-it-saves) have a table of their own.",
        "| `fastv:layer=2` | 518 | 0.99 no gain | 0.84 |",
        "Inference in onnxruntime 1.32.0",
        "| vit_small_patch16 224 px, 1, fp32 | 2 | 41.2 | 0.73 | 1.53 no gain |",
        "Pre-training step",
        "| albef 256 px, 4, fp32, width 192 | 1500 | 0.99 no gain (0.88, 0.81) | 0.73 (0.72, 0.80)",
        "| meter 256 px, 4, fp32, width 192 | 1500 | 0.90 (0.88, 0.81) | – |",
        "compiled was not measured: no compiler.",
        "no kernel runs on this device",
    ):
        assert part in text, part
    assert ".svg" not in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": {"planned": 9, "failed": ["test_a"], "missing": []}}, "1 of 9 benchmarks failed"),
        ({"run": {"planned": 9, "failed": [], "missing": ["b", "c"]}}, "missing: b, c"),
        ({"run": None}, "expected 'run'"),
        ({"commit_info": {}}, "expected the measured commit"),
    ],
)
def test_an_incomplete_run_is_refused(page, tmp_path, capsys, change, reason):
    assert main(page(entries(), **change)) == 1
    assert reason in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["benchmarks.md"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parity": PASSED | {"passed": False}}, "parity failed"),
        ({"parity": PASSED | {"max_abs": 2e-6}}, "parity failed"),
        ({"parity": PASSED | {"max_abs": float("nan")}}, "parity failed"),
        ({"parity": PASSED | {"coarser": PASSED | {"max_abs": 2e-6}}}, "parity failed"),
        ({"parity": None}, "parity was not checked"),
        ({"rounds": 3}, "expected 10 rounds or more, got 3"),
    ],
)
def test_results_without_parity_are_refused(page, tmp_path, capsys, change, reason):
    op, *others = entries()
    arguments = page([*others, op | change])
    before = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert reason in message and "bench.json: reduce" in message
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == before
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["benchmarks.md"]


def test_the_committed_page_shows_the_committed_results():
    assert main(["--check"]) == 0


@pytest.mark.slow
def test_every_benchmark_runs_and_passes_parity(tmp_path):
    path = tmp_path / "bench.json"
    words = ("benchmarks", "--benchmark-only", "--smallest", "--rounds", "1")
    own = {n: value for n, value in os.environ.items() if not n.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--benchmark-json", str(path)],
        cwd=ROOT,
        env=own | {"CXX": "no-such-compiler", "COMMIT": "0123456789"},  # no worker of this run
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    found = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    assert content["run"] == {"planned": len(found), "failed": [], "missing": []}
    assert all(facts["parity"]["passed"] and facts["ratios"] for facts in found)
