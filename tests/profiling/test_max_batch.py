"""The largest training batch, by a line through two small ones, dense and reduced."""

import json

import pytest

from elip_models.pretraining.models.registry import create_model
from elip_models.profiling.max_batch import largest_batches
from elip_models.profiling.measure import saved_bytes
from elip_models.profiling.workload import Workload
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import elip


@pytest.mark.parametrize(
    "name",
    tiered(["elip_clip_tiny", "elip_blip_tiny"], ["elip_clip_tiny"]),
)
def test_the_largest_batch_fits_and_one_more_does_not(name):
    model = create_model(name)
    weights = sum(each.numel() for each in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    memory = 4 * (weights + 3 * trained) + 200 * 2**20
    dense, reduced = largest_batches(name, model, {"own": model.reduction}, memory)
    assert dense.model_state == reduced.model_state == 4 * (weights + 3 * trained)
    for row, strategy in ((dense, None), (reduced, model.reduction)):
        forward = Workload(model, 11).forward(strategy)
        with saved_bytes(model.parameters()) as count:
            forward()
        assert row.fixed + 11 * row.per_image == pytest.approx(count(), rel=0.02)
        free = memory - row.model_state - row.fixed
        assert row.batch * row.per_image <= free < (row.batch + 1) * row.per_image
    assert reduced.ratio == pytest.approx(reduced.batch / dense.batch, abs=1e-3)
    assert reduced.ratio > 1.1


def test_flops_only_with_max_batch_raises(capsys):
    assert elip("profile", "--model", "clip_tiny", "--max-batch", "--flops-only") == 2
    assert "--flops-only: expected it without --max-batch" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_command_prints_and_writes(tmp_path, capsys):
    output = tmp_path / "batches.json"
    command = ["profile", "--model", "clip_tiny", "--max-batch", "--memory", "1GB"]
    assert elip(*command, "--output", output) == 0
    said = capsys.readouterr().out
    assert "largest training batch in 1GB" in said and "bytes saved for backward" in said
    document = json.loads(output.read_text())
    assert document["memory"] == 2**30
    assert [row["strategy"] for row in document["rows"]] == ["dense", "elip:scorer=exact"]
