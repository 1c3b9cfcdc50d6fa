"""benchmarks/tune.py without a GPU: the sweep in PyTorch, and compilation of candidates."""

import json
from contextlib import contextmanager

import pytest
import torch

from benchmarks import tune
from benchmarks.gpu_run import TO_BE_CONTINUED
from benchmarks.sweeps import SWEEPS, Shape, Sweep, arguments
from benchmarks.tune import changed, changed_table
from elip_kernels._triton import HAS_TRITON

SMALL, OTHER = Shape(2, 18, torch.float32), Shape(3, 18, torch.float32)


def test_a_candidate_changes_only_the_numbers_it_names():
    answer = {"BLOCK_N": 256, "BLOCK_D": 64, "WIDEN": False, "num_warps": 8}
    changes = {"BLOCK_D": 0.5, "num_warps": 4}
    assert changed(answer, changes) == answer | {"BLOCK_D": 32, "num_warps": 4}
    assert changed((32, 32, 64, 4), {1: 2.0, 3: 8}) == (32, 64, 64, 8)
    with pytest.raises(ValueError, match=r"axes: expected .*BLOCK_N.*, got \['BLOCK_K'\]"):
        changed(answer, {"BLOCK_K": 16})


def test_every_sweep_runs_and_writes_a_complete_file(tmp_path, capsys):
    out = tmp_path / "tune.json"
    few = [Sweep(s.op, s.table, {a: n[:1] for a, n in s.axes.items()}) for s in SWEEPS]
    assert tune.tune(few, [SMALL], out, rounds=1, seconds=60) == 0
    document = json.loads(out.read_text())
    assert [result["name"] for result in document["results"]] == [f"{s} {SMALL}" for s in few]
    for result in document["results"]:
        (entry,) = result["candidates"]
        assert entry["candidate_us"] > 0 and entry["of_table"] > 0
    assert {"device", "versions", "commit"} <= document.keys()
    assert len(capsys.readouterr().out.splitlines()) == len(few)


def test_a_sweep_without_time_left_is_reported_and_run_next_time(tmp_path, capsys):
    out, one = tmp_path / "tune.json", [Sweep("reduce", "reduce_forward", {"num_warps": (4,)})]
    for shapes, seconds, status, line in (
        ([SMALL], 60, 0, "reduce.reduce_forward B2-N18-fp32: "),
        ([SMALL, OTHER], 0, TO_BE_CONTINUED, "not run, out of time: reduce.reduce_forward B3-"),
        ([SMALL, OTHER], 60, 0, "reduce.reduce_forward B3-N18-fp32: "),
    ):
        assert tune.tune(one, shapes, out, rounds=1, seconds=seconds) == status
        (written,) = capsys.readouterr().out.splitlines()
        assert written.startswith(line)
    with pytest.raises(ValueError, match="results of another run"):
        tune.tune(one, [SMALL], out, rounds=2, seconds=60)


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: f"{sweep.op}-{sweep.table}")
def test_a_candidate_with_other_results_is_wrong(tmp_path, monkeypatch, capsys, sweep):
    right = tune.results

    @contextmanager
    def spoiling(table, changes):
        def spoilt(op, args):
            first, *others = right(op, args)
            return first + bool(changes), *others

        with monkeypatch.context() as patch:
            patch.setattr(tune, "results", spoilt)
            yield

    monkeypatch.setattr(tune, "changed_table", spoiling)
    one = Sweep(sweep.op, sweep.table, {axis: numbers[:1] for axis, numbers in sweep.axes.items()})
    assert tune.tune([one], [SMALL], tmp_path / "tune.json", rounds=1, seconds=60) == 1
    assert "1 WRONG" in capsys.readouterr().out


def test_a_candidate_that_does_not_compile_is_left_out_and_a_lost_device_ends_the_sweep(
    monkeypatch, tmp_path, capsys
):
    message = "PassManager::run failed\nmore"

    @contextmanager
    def refusing(table, changes):
        if changes:
            raise RuntimeError(message)
        yield

    monkeypatch.setattr(tune, "changed_table", refusing)
    monkeypatch.setattr(tune, "tuned_kernels", lambda *_: set())
    one = Sweep("reduce", "reduce_forward", {"num_warps": (4,)})
    assert tune.tune([one], [SMALL], tmp_path / "tune.json", rounds=1, seconds=60) == 0
    assert "no candidate ran; 1 left out" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "tune.json").read_text())["results"]
    assert result["candidates"][0]["left_out"] == "RuntimeError: PassManager::run failed"
    message = "CUDA error: unspecified launch failure"
    with pytest.raises(RuntimeError, match=r"reduce\.reduce_forward B2-N18-fp32: .*num_warps"):
        tune.tune([one], [SMALL], tmp_path / "other.json", rounds=1, seconds=60)


def test_the_command_needs_a_gpu_and_known_ops(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "ON_GPU", False)
    for words, message in (([], "expected a CUDA or ROCm device"), (["softmax"], "OP: expected")):
        with pytest.raises(SystemExit):
            tune.main(["--out", str(tmp_path / "tune.json"), *words])
        assert message in capsys.readouterr().err


def recorded(sweep, args, changes):
    """Return the launches of an op with a candidate's numbers."""
    from benchmarks.kernel_analysis.compile import recorded_launches

    with recorded_launches(90) as launches, changed_table(sweep.table, changes):
        tune.results(sweep.op, args)
    return launches


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so there is nothing to compile")
@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS[:1], ids=str)
def test_the_kernels_that_a_sweep_changes_are_timed_and_the_largest_compile(monkeypatch, sweep):
    from benchmarks.kernel_analysis.compile import compile_launch, recorded_launches

    monkeypatch.setattr(tune, "ON_GPU", True)  # the launchers run, on tensors of the CPU
    args, candidates = arguments(sweep.op, Shape(64, 257, torch.bfloat16)), sweep.candidates()
    with recorded_launches(90):
        kernels = tune.tuned_kernels(sweep, args)
    first, last = (recorded(sweep, args, each) for each in (candidates[0], candidates[-1]))
    changes = {b.name for a, b in zip(first, last, strict=True) if a.options != b.options}
    assert changes and changes <= kernels
    assert len(kernels) < len(first) or sweep.op not in ("score_reduce", "cls_attention_output")
    assert all(compile_launch(each, 90).registers > 0 for each in last)
