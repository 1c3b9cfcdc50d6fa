"""Training: parameter groups, learning rates, steps, precision, and errors that stop a run."""

import json
import logging
import math
import subprocess
import sys
import warnings

import pytest
import torch
from rich.console import Console

from elip_models.pretraining.data import DataError
from elip_models.pretraining.models.clip.model import CLIP
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training.optim import learning_rate, parameter_groups
from elip_models.pretraining.training.run_config import OptimConfig
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import Trainer, train
from elip_models.validation import ConfigError, TrainingError
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import logged, own_process, tiny_arguments, tiny_config
from tests.helpers.weights import assert_equal_weights


@pytest.fixture(autouse=True)
def _own_process():
    with own_process():
        yield


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [
        ("linear", 10, 2.0),
        ("linear", 55, 1.1),
        ("linear", 100, 0.2),
        ("cosine", 55, 1.1),
        ("cosine", 100, 0.2),
        ("step", 10, 2.0),
        ("step", 24, 2.0),
        ("step", 25, 1.0),
        ("step", 99, 0.25),
        ("step", 100, 0.2),
        ("step", 4, 1.0),
    ],
)
def test_decay_of_the_learning_rate(decay, step, expected):
    settings = {"lr": 2.0, "min_lr": 0.2, "warmup_steps": 10, "decay": decay, "decay_rate": 0.5}
    optim = OptimConfig(batch_size=1, **settings)
    rate = learning_rate(step, optim, total_steps=100, steps_per_epoch=25)
    assert rate == pytest.approx(expected)


def test_learning_rates_of_named_parameters():
    model = create_model("meter_tiny", vocab_size=300)
    scales = {"itm_head.bias": 2, "itm_head.*": 5, "text_layers.*": 3.0}
    groups = parameter_groups(model, 0.1, scales)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    scale_of = {name_of[p]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale_of.keys() == set(name_of.values())
    assert (scale_of["itm_head.bias"], scale_of["itm_head.weight"]) == (2, 5)
    others = {n for n in scale_of if not n.startswith(("itm_head.", "text_layers."))}
    assert {scale_of[name] for name in others} == {1.0}
    assert all((g["weight_decay"] == 0.1) == (g["params"][0].squeeze().ndim >= 2) for g in groups)
    with pytest.raises(ValueError, match=r"lr_scale: expected patterns.*'itn_head"):
        parameter_groups(model, 0.1, {"itn_head.*": 5})


def losses(folder):
    return [row["loss"] for row in logged(folder, "loss")]


def test_matrices_decay_and_nothing_else():
    model = create_model("clip_tiny", vocab_size=300)
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    not_decayed = {name_of[parameter] for parameter in others["params"]}
    assert {name_of[p] for p in decayed["params"]} == set(name_of.values()) - not_decayed
    assert {"logit_scale", "visual.cls_token", "visual.norm.weight"} <= not_decayed
    bias_or_norm = {name for name in name_of.values() if name.endswith("bias") or "norm" in name}
    assert bias_or_norm <= not_decayed
    assert len(not_decayed - bias_or_norm) == 2
    assert not any("proj.weight" in name or "fc1.weight" in name for name in not_decayed)


def test_frozen_parameters_are_not_optimised():
    model = create_model("clip_tiny", vocab_size=300)
    model.visual.requires_grad_(False)
    optimised = {p for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert optimised == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("step", "warmup_steps", "expected"),
    [
        (0, 10, 0.1),
        (4, 10, 0.5),
        (9, 10, 1.0),
        (10, 10, 1.0),
        (55, 10, 0.5),
        (100, 10, 0.0),
        (0, 0, 1.0),
        (50, 0, 0.5),
        (19, 5000, 1.0),  # capped at a fifth of the run
        (9, 5000, 0.5),
    ],
)
def test_learning_rate(step, warmup_steps, expected):
    optim = OptimConfig(batch_size=1, lr=2.0, warmup_steps=warmup_steps)
    rate = learning_rate(step, optim, total_steps=100)
    assert rate == pytest.approx(2.0 * expected)


def test_logged_learning_rate_is_the_schedule(tmp_path):
    train(tiny_config(tmp_path, "optim.steps=6", "optim.warmup_steps=1", "optim.lr=0.002"))
    rates = [row["lr"] for row in logged(tmp_path, "lr")]
    optim = OptimConfig(batch_size=1, lr=0.002, warmup_steps=1)
    assert rates == [learning_rate(s, optim, total_steps=6) for s in range(6)]


def test_loss_falls_and_the_saved_model_is_the_trained_one(tmp_path):
    config = tiny_config(
        tmp_path, "data.train=emoji_scenes:size=16", "optim.steps=40", "optim.lr=0.003"
    )
    result = train(config)
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]
    assert result.loss == losses(tmp_path)[-1]
    saved = CLIP.from_pretrained(tmp_path / "model")
    assert_equal_weights(saved, result.model)


def test_same_seed_same_losses_other_seed_other_losses(tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train(tiny_config(tmp_path / name, f"seed={seed}", "model.overrides.drop_path=0.2"))
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    assert losses(tmp_path / "first") != losses(tmp_path / "other")


def test_accumulation_takes_half_as_many_steps_of_the_epoch(tmp_path):
    config = tiny_config(
        tmp_path,
        "data.train=emoji_scenes:size=64",
        "optim.steps=null",
        "optim.epochs=1",
        "optim.batch_size=8",
        "optim.grad_accumulation=2",
    )
    assert train(config).step == 4
    rows = logged(tmp_path, "loss", "step", "epoch")
    assert [(row["step"], row["epoch"]) for row in rows] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
        (4, 1.0),
    ]
    checkpoint = RunFolder(tmp_path).checkpoints.latest()
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    assert {int(moments["step"]) for moments in state.values()} == {4}


@pytest.mark.slow
def test_grad_checkpointing_gives_the_same_losses(tmp_path):
    for name in ("true", "false"):
        overrides = f"optim.grad_checkpointing={name}", "model.overrides.drop_path=0.2"
        train(tiny_config(tmp_path / name, *overrides))
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-5)


def test_bf16_is_finite_and_near_fp32(tmp_path):
    with own_process():
        train(tiny_config(tmp_path / "fp32"))
    result = train(tiny_config(tmp_path / "bf16", "optim.precision=bf16", "report=[retrieval]"))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert all(map(math.isfinite, losses(tmp_path / "bf16")))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


def test_non_finite_loss_stops_the_run_and_saves_nothing(tmp_path):
    config = tiny_config(
        tmp_path,
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "optim.max_nonfinite_steps=2",
        "log_every=3",
        "checkpoint_every=3",
    )
    with pytest.raises(TrainingError, match=r"step 3, the last of 2.*loss nan.*lower optim\.lr"):
        train(config)
    assert RunFolder(tmp_path).checkpoints.latest() is None


def test_evaluates_during_and_after_training(tmp_path):
    result = train(tiny_config(tmp_path, "eval_every=3", "report=[retrieval]", "log_every=2"))
    rows = logged(tmp_path, "image_to_text_r1", "text_to_image_r10", "step")
    assert [row["step"] for row in rows] == [3, 4]
    assert result.scores.recalls["image_to_text_r1"] == rows[-1]["image_to_text_r1"]
    assert [row["step"] for row in logged(tmp_path, "step")] == [2, 3, 4, 4]


def test_tensorboard_contains_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config(tmp_path, "trackers=[tensorboard]"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "clip_tiny"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path))
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4]


OPTIONS = ("optim.name=muon", "optim.ema=0.7", "optim.compile=aot_eager")


SIGMOID = (*OPTIONS, "model.overrides.loss=sigmoid")


@pytest.mark.parametrize("options", tiered([((),), (SIGMOID,)], [], slow=[((),)]))
def test_two_processes_equal_one_with_the_whole_batch(tmp_path, options):
    one = tiny_config(tmp_path / "one", *options, "optim.batch_size=8", "optim.gather=global")
    train(one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "elip_models.cli"]
    half = (*options, "optim.batch_size=4", "optim.gather=global")
    arguments = tiny_arguments(tmp_path / "two", *half)
    subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=120)
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


@pytest.mark.exhaustive
def test_an_evaluation_may_take_longer_than_processes_wait_in_training(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "tests.helpers.slow_evaluation", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert logged(tmp_path, "text_to_image_r1")
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=clip_tny", "model: .*clip_tny"),
        ("model.overrides={colour: red}", "model: .*colour"),
        (
            "model.overrides.gather=global",
            r"model\.overrides\.gather: expected .local.*set optim\.gather",
        ),
        ("data.train=missing.json", r"data\.train: .*missing\.json"),
        ("data.eval=missing.json", r"data\.eval: .*missing\.json"),
        ("data.vocab_size=5", r"data\.vocab_size: .*at least 261.*got 5"),
        ("data.tokenizer=/missing/folder", r"data\.tokenizer: .*missing/folder"),
        ("optim.batch_size=49", r"optim\.batch_size: .*at most 48.*got 49"),
        ("trackers=[blackboard]", "trackers: .*blackboard"),
    ],
)
def test_a_setting_that_does_not_fit_raises(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path, override))


def test_config_is_checked():
    with pytest.raises(TypeError, match=r"config: expected a RunConfig.*got 'clip_tiny'"):
        train("clip_tiny")


def one_caption_each(folder, *second):
    """Write a list of sixteen images, the first of which have a second caption."""
    captions = [[f"picture {i}", *second[i : i + 1]] for i in range(16)]
    entries = [{"image": f"{i}.png", "caption": texts} for i, texts in enumerate(captions)]
    (folder / "list.json").write_text(json.dumps(entries))
    return f"data.train={folder / 'list.json'}"


def test_guide_other_raises_if_no_image_has_two_captions(tmp_path):
    config = tiny_config(
        tmp_path / "run", one_caption_each(tmp_path), "model.overrides.guide=other"
    )
    with pytest.raises(ConfigError, match=r"model\.overrides\.guide: expected 'own'.*'other'"):
        train(config)


def test_guide_other_warns_of_images_with_one_caption(tmp_path):
    data = one_caption_each(tmp_path, "a second one")
    config = tiny_config(tmp_path / "run", data, "model.overrides.guide=other")
    with pytest.warns(UserWarning, match="94% of the images have one"), pytest.raises(DataError):
        train(config)  # no image is there


def test_too_much_unreadable_data_stops_the_run(tmp_path):
    entries = [{"image": f"{i}.png", "caption": f"picture {i}"} for i in range(16)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"no readable sample in .*list\.json\[\d+\] \d+\.png"):
        train(tiny_config(tmp_path / "run", f"data.train={tmp_path / 'list.json'}"))


def test_the_trainer_opens_nothing_before_it_runs(tmp_path):
    Trainer(tiny_config(tmp_path / "run"), resume=False, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_loggers_and_warning_filters_as_they_were(tmp_path):
    logger = logging.getLogger("accelerate.utils.other")
    before = list(logger.filters), list(warnings.filters)
    with own_process():
        train(tiny_config(tmp_path, "optim.steps=1"))
    assert (logger.filters, list(warnings.filters)) == before
