"""benchmarks/tune.py without a GPU: the sweep in PyTorch."""

import json
from contextlib import contextmanager

import pytest
import torch

from benchmarks import tune
from benchmarks.sweeps import SWEEPS, Shape, Sweep

SMALL, OTHER = Shape(2, 18, torch.float32), Shape(3, 18, torch.float32)


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
