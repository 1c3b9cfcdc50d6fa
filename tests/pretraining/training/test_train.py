"""Training of every family: losses, precision, evaluation, the log, and errors that stop a run."""

import pytest
import torch

from elip_models.pretraining.models.registry import load_model
from elip_models.pretraining.training.optim import learning_rate
from elip_models.pretraining.training.run_config import OptimConfig
from elip_models.pretraining.training.trainer import Trainer, train
from elip_models.validation import ConfigError, TrainingError
from tests.helpers.tiers import first_quick, tiered
from tests.helpers.tiny_run import logged, own_process, tiny_arguments, tiny_config
from tests.helpers.torchrun import run_twice
from tests.helpers.weights import assert_equal_weights

LOSSES = {
    "clip_tiny": ("loss",),
    "albef_tiny": ("loss", "loss_itc", "loss_itm", "loss_mlm"),
    "blip_tiny": ("loss", "loss_itc", "loss_itm", "loss_lm"),
    "meter_tiny": ("loss", "loss_mlm", "loss_itm"),
}


def losses(folder):
    return [row["loss"] for row in logged(folder, "loss")]


def test_loss_falls_and_the_saved_model_is_the_trained_one(tmp_path):
    options = ("data.train=emoji_scenes:size=16", "optim.steps=40", "optim.lr=0.003")
    result = train(tiny_config(tmp_path, *options))
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]
    assert result.loss == losses(tmp_path)[-1]
    assert_equal_weights(load_model(tmp_path / "model"), result.model)
    optim = OptimConfig(batch_size=1, lr=0.003, warmup_steps=1)
    rates = [row["lr"] for row in logged(tmp_path, "lr")]
    assert rates == [learning_rate(step, optim, total_steps=40) for step in range(40)]


def test_same_seed_same_losses_other_seed_other_losses(tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train(tiny_config(tmp_path / name, f"seed={seed}", "model.overrides.drop_path=0.2"))
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    assert losses(tmp_path / "first") != losses(tmp_path / "other")


def test_accumulation_takes_half_as_many_steps_of_the_epoch(tmp_path):
    data = ("data.train=emoji_scenes:size=64", "optim.steps=null", "optim.epochs=1")
    options = (*data, "optim.batch_size=8", "optim.grad_accumulation=2")
    assert train(tiny_config(tmp_path, *options)).step == 4
    assert [row["epoch"] for row in logged(tmp_path, "epoch", "loss")] == [0.25, 0.5, 0.75, 1.0]


CHEAP = [
    ("clip_tiny", ("bf16", "true")),
    ("clip_tiny", ("fp32", "true")),
    ("albef_tiny", ("bf16", "true")),
]


@pytest.mark.parametrize(("recipe", "options"), first_quick(CHEAP))
def test_bf16_and_checkpointing_stay_near_fp32(recipe, options, tmp_path):
    precision, checkpointing = options
    is_clip = recipe == "clip_tiny"
    random = ("model.overrides.drop_path=0.2",) if is_clip and precision == "fp32" else ()
    cheap = (f"optim.precision={precision}", f"optim.grad_checkpointing={checkpointing}")
    for name, overrides in (("whole", ()), ("cheap", cheap)):
        with own_process():
            result = train(tiny_config(tmp_path / name, *random, *overrides, recipe=recipe))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    rows = [logged(tmp_path / name, *LOSSES[recipe]) for name in ("whole", "cheap")]
    assert rows[0] != rows[1] or precision == "fp32"
    tolerance = 1e-5 if precision == "fp32" else 0.02 if is_clip else 0.05
    for full, cheap_row in zip(*rows, strict=True):
        assert cheap_row == pytest.approx(full, rel=tolerance)


def test_evaluates_during_and_after_training(tmp_path):
    result = train(tiny_config(tmp_path, "eval_every=3", "report=[retrieval]", "log_every=2"))
    rows = logged(tmp_path, "image_to_text_r1", "text_to_image_r10", "step")
    assert [row["step"] for row in rows] == [3, 4]
    assert result.scores.scores["image_to_text_r1"].mean == rows[-1]["image_to_text_r1"]
    assert [row["step"] for row in logged(tmp_path, "step")] == [2, 3, 4, 4]


def test_tensorboard_contains_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config(tmp_path, "trackers=[tensorboard]"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "clip_tiny"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path))
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4]


@pytest.mark.parametrize("recipe", tiered(["albef_tiny", "blip_tiny"], ["albef_tiny"]))
def test_momentum_targets_are_warmed_up_by_epoch(recipe, tmp_path):
    train(tiny_config(tmp_path, "optim.batch_size=16", "optim.steps=9", recipe=recipe))
    epochs = 1.0 if recipe == "albef_tiny" else 2.0
    alpha = [row["alpha"] for row in logged(tmp_path, "alpha")]
    assert alpha == pytest.approx([0.4 * min(1.0, step / 3 / epochs) for step in range(9)])


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    train(tiny_config(tmp_path / "one", "optim.gather=global", "optim.batch_size=8"))
    arguments = tiny_arguments(tmp_path / "two", "optim.gather=global", "optim.batch_size=4")
    run_twice("elip_models.cli", *arguments)
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


UNFIT = [
    ("clip_tiny", "model.name=clip_tny", "model: .*clip_tny"),
    ("clip_tiny", "model.overrides.gather=global", r"model\.overrides\.gather: .*optim\.gather"),
    ("clip_tiny", "data.train=missing.json", r"data\.train: .*missing\.json"),
    ("clip_tiny", "data.vocab_size=5", r"data\.vocab_size: .*at least 261.*got 5"),
    ("clip_tiny", "optim.batch_size=49", r"optim\.batch_size: .*at most 48.*got 49"),
    ("clip_tiny", "trackers=[blackboard]", "trackers: .*blackboard"),
    ("meter_tiny", "report=[retrieval]", "report: expected no retrieval.*METER"),
    ("albef_tiny", "optim.batch_size=32", "model: queue_size: expected at least the batch, 32"),
    ("albef_tiny", "optim.lr_scale={temprature: 0.1}", "optim: lr_scale: .*temprature"),
]


@pytest.mark.parametrize(("recipe", "override", "message"), UNFIT)
def test_a_setting_that_does_not_fit_raises(tmp_path, recipe, override, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path, override, recipe=recipe))


def spoil_losses(monkeypatch, steps):
    """Patch the loss of these steps, counted from 1, to NaN."""
    forward = Trainer._forward

    def spoiling(self, tensors):
        output = forward(self, tensors)
        if self.step + 1 in steps:
            output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(Trainer, "_forward", spoiling)


def test_a_run_continues_and_counts_nonfinite_steps(tmp_path, monkeypatch):
    spoil_losses(monkeypatch, {2})
    result = train(tiny_config(tmp_path))
    rows = logged(tmp_path, "loss", "step")
    assert [row["loss"] for row in rows[:2]] == [rows[0]["loss"]] * 2  # of the last finite step
    assert rows[3]["loss"] < rows[0]["loss"] and result.step == 4
    assert [row["nonfinite"] for row in logged(tmp_path, "nonfinite")] == [1, 1, 1]
    assert all(weight.isfinite().all() for weight in result.model.parameters())


def test_too_many_nonfinite_steps_end_the_run_and_keep_the_last_checkpoint(tmp_path, monkeypatch):
    spoil_losses(monkeypatch, {2, 3, 4, 5, 6, 7, 8})
    settings = ("optim.steps=8", "optim.max_nonfinite_steps=3", "checkpoint_every=1")
    with pytest.raises(TrainingError, match=r"step 4, the last of 3 in a row.*nan"):
        train(tiny_config(tmp_path, *settings))
    assert max(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == "step_00000003"


@pytest.mark.parametrize("evaluation", ["eval_every=0", "eval_every=1"])
def test_weights_that_are_not_finite_are_neither_saved_nor_evaluated(tmp_path, evaluation):
    rate = ("optim.lr=1e37", "optim.warmup_steps=0", "optim.steps=2", "optim.weight_decay=1e3")
    with pytest.raises(TrainingError, match="tensors of the model have NaN or infinity, the first"):
        train(tiny_config(tmp_path, *rate, evaluation))
    assert not [*tmp_path.glob("checkpoints/*"), *tmp_path.glob("model"), *tmp_path.glob("best")]
