"""Steps that are not finite are skipped and counted; too many in a row end the run."""

import copy
import json

import pytest
import torch

from elip_models.pretraining.training.optimizers import skip_nonfinite_step_, step_
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import TrainingError
from tests.helpers.tiny_run import logged, own_process, tiny_config


def trained(fused):
    """Return a layer and its optimiser after a step, with gradients for the next one."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=fused)
    layer(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    return layer, optimizer


def state_of(layer, optimizer):
    return copy.deepcopy([layer.state_dict(), optimizer.state_dict()["state"]])


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
@pytest.mark.parametrize("fused", [False, True])
def test_a_nonfinite_step_changes_neither_weights_nor_state(fused, norm):
    layer, optimizer = trained(fused)
    before = state_of(layer, optimizer)
    layer.weight.grad.fill_(norm)
    if fused:  # as on a GPU, where the host does not ask
        skip_nonfinite_step_(optimizer, torch.tensor(norm))
        optimizer.step()
    else:
        step_(optimizer, torch.tensor(norm))
    torch.testing.assert_close(state_of(layer, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_finite_step_equals_the_step_of_the_optimiser(fused):
    layer, optimizer = trained(fused)
    other, expected = trained(fused)
    expected.step()
    if fused:
        skip_nonfinite_step_(optimizer, torch.tensor(1.0))
        optimizer.step()
    else:
        step_(optimizer, torch.tensor(1.0))
    torch.testing.assert_close(
        state_of(layer, optimizer), state_of(other, expected), rtol=0, atol=0
    )


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


def test_a_run_writes_its_provenance(tmp_path):
    with own_process():
        train(tiny_config(tmp_path))
        train(tiny_config(tmp_path, "optim.steps=5"), resume=True)
    lines = (tmp_path / "provenance.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert [first["resumed"], second["resumed"]] == [None, "step_00000004"]
    assert first["versions"]["torch"] == torch.__version__ and first["data"]["samples"] == 48
    assert first["data"] == second["data"] and len(first["data"]["sha256"]) == 64
    with own_process():
        other = train(tiny_config(tmp_path / "other", "data.train=emoji_scenes:seed=2,size=48"))
    line = json.loads((other.output_dir / "provenance.jsonl").read_text())
    assert line["data"]["sha256"] != first["data"]["sha256"]
