"""Steps that are not finite are skipped and counted; too many in a row end the run."""

import pytest
import torch

from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import TrainingError
from tests.helpers.tiny_run import logged, own_process, tiny_config


def with_losses(monkeypatch, spoilt):
    """Patch the loss of these steps, counted from 1, to NaN."""
    from elip_models.pretraining.training.trainer import Trainer

    forward = Trainer._forward

    def spoiling(self, tensors):
        output = forward(self, tensors)
        if self.step + 1 in spoilt:
            output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(Trainer, "_forward", spoiling)


def test_a_run_continues_and_counts_skipped_steps(tmp_path, monkeypatch):
    with_losses(monkeypatch, {2})
    with own_process():
        result = train(tiny_config(tmp_path))
    rows = logged(tmp_path, "loss", "step")
    assert [row["loss"] for row in rows[:2]] == [rows[0]["loss"]] * 2  # of the last finite step
    assert rows[3]["loss"] < rows[0]["loss"] and result.step == 4
    assert [row["nonfinite"] for row in logged(tmp_path, "nonfinite")] == [1, 1, 1]
    weights = result.model.state_dict().values()
    assert all(each.isfinite().all() for each in weights if each.is_floating_point())


def test_too_many_nonfinite_steps_end_the_run_and_keep_the_last_checkpoint(tmp_path, monkeypatch):
    with_losses(monkeypatch, {2, 3, 4, 5, 6, 7, 8})
    settings = ("optim.steps=8", "optim.max_nonfinite_steps=3", "checkpoint_every=1")
    with own_process(), pytest.raises(TrainingError, match=r"step 4, the last of 3 in a row.*nan"):
        train(tiny_config(tmp_path, *settings))
    assert RunFolder(tmp_path).checkpoints.latest().name == "step_00000003"
