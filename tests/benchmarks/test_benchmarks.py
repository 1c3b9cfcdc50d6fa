"""Results of benchmarks: what they record, the tables of plot.py, and refused results."""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.plot import main
from elip_models import STRATEGIES
from elip_models.pretraining.models.registry import FAMILIES
from elip_models.strategies.scorers import SCORERS
from tests.helpers.tiers import tiered

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


def test_charts_show_kernels_and_several_towers(page, tmp_path):
    op, tower, *_ = entries()
    towers = [tower | {"shape": {"B": batch, "image": 256}} for batch in (1, 4, 16)]
    assert main(page([op | {"kernels": True}, *towers])) == 0
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    for name in ("some-cpu-towers.svg", "some-cpu-ops.svg"):
        assert f"({name})" in text
        assert "</svg>" in (tmp_path / "docs" / name).read_text()


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


def test_a_page_without_markers_is_refused(page, tmp_path, capsys):
    arguments = page(entries())
    (tmp_path / "docs" / "benchmarks.md").write_text("nothing")
    assert main(arguments) == 1
    assert BEGIN in capsys.readouterr().err


def test_the_committed_page_shows_the_committed_results():
    assert main(["--check"]) == 0


def measured(folder, *words):
    """Run pytest with these words; return its exit status and the JSON that it wrote."""
    path = folder / "device" / "bench.json"
    path.parent.mkdir()
    command = [sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider"]
    own = {n: value for n, value in os.environ.items() if not n.startswith("PYTEST_")}
    more = {"CXX": "no-such-compiler", "COMMIT": "0123456789", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [*command, "--benchmark-json", str(path)],
        cwd=ROOT,
        env=own | more,  # without the variables that make it a worker of this run
        capture_output=True,
        text=True,
    )
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text())


@pytest.fixture
def measure(tmp_path):
    """Return `measured` in a temporary folder."""
    return partial(measured, tmp_path)


def refused(folder, capsys):
    """Return the error of plot.py for the results in a folder."""
    page = folder / "benchmarks.md"
    page.write_text(f"{BEGIN}{END}")
    assert main(["--results", str(folder), "--page", str(page)]) == 1
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_records_parity_and_nothing_private(measure, tmp_path, capsys):
    words = ("benchmarks/bench_reduce.py", "--rounds", "1", "-k", "B1- and backward")
    status, content = measure(*words)
    assert status == 0
    assert content["machine_info"].keys() == {"device", "threads", "versions"}
    assert content["commit_info"] == {"id": "0123456789", "dirty": False}
    assert content["run"] == {"planned": 1, "failed": [], "missing": []}
    (benchmark,) = content["benchmarks"]
    facts = benchmark["extra_info"]
    assert facts["parity"]["passed"] and facts["ratios"].keys() == {"official", "eager"}
    assert "no-such-compiler" in facts["left_out"]["compiled"]
    assert facts["versions"]["torch"] == version("torch")
    assert facts["possible"]["elip_kernels"] > 0
    assert facts["bytes"] > 0 and facts["kernels"] == torch.cuda.is_available()
    assert "rounds" in refused(tmp_path, capsys)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """Run every benchmark at its smallest size; return exit status, run and entries by name."""
    words = ["benchmarks", "--benchmark-only", "--smallest", "--rounds", "1"]
    status, content = measured(tmp_path_factory.mktemp("smallest"), *words)
    return status, content["run"], {e["name"]: e["extra_info"] for e in content["benchmarks"]}


@pytest.mark.slow
def test_every_benchmark_runs_and_passes_parity(smallest):
    status, run, found = smallest
    assert run["failed"] == [] and run["missing"] == [] and status == 0
    assert len(found) == run["planned"]
    assert all(facts["parity"]["passed"] and facts["ratios"] for facts in found.values())


@pytest.mark.slow
def test_each_strategy_scorer_and_model_has_a_benchmark(smallest):
    *_, found = smallest
    measured_by_copy = {facts["op"] for facts in found.values() if "possible" in facts}
    assert {"reduce", "score_reduce", "merge_nearest", "unmerge"} <= measured_by_copy
    of_strategies = found["test_strategies[inference-B1]"]
    assert of_strategies["ratios"].keys() == STRATEGIES.keys()
    of_towers = found["test_tower[tiny-96px-B1-fp32-inference]"]
    assert of_towers["ratios"].keys() == SCORERS.keys()
    of_models = {facts["family"] for facts in found.values() if "family" in facts}
    assert of_models == FAMILIES.keys()


SPOILS = """
import elip_kernels
own = elip_kernels.unmerge
elip_kernels.unmerge = lambda *args: own(*args) + 1

def pytest_runtest_setup(item):
    if STOPS and "unmerge" in item.name:
        raise KeyboardInterrupt
"""


@pytest.mark.parametrize("stops", tiered([False, True], []))
def test_a_run_that_failed_or_was_stopped_is_refused(measure, tmp_path, capsys, stops):
    (tmp_path / "spoils.py").write_text(SPOILS.replace("STOPS", str(stops)))
    words = ("--smallest", "-k", "merge", "-p", "spoils")
    status, content = measure("benchmarks/bench_parts.py", *words)
    assert status != 0
    run = content["run"]
    assert (run["planned"], len(run["failed"]), len(run["missing"])) == (2, not stops, stops)
    assert "unmerge" in str(run["failed"] + run["missing"])
    (passed,) = content["benchmarks"]
    assert "apply_merge" in passed["name"]
    assert "1 of 2 benchmarks" in refused(tmp_path, capsys)
