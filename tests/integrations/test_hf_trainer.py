"""`ReductionCallback` sets the reduction of each step of transformers' Trainer, resumed or not."""

import pytest
import torch
import transformers
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import elip_models
from elip_models import ELIP, PatchDropout, ToMe
from elip_models.integrations.hf_trainer import ReductionCallback
from elip_models.reduction.serialization import settings_of
from tests.helpers.models import hf_clip, hf_vision
from tests.helpers.towers import SCHEDULE, assert_equal_gradients, plain_vit

HALF = PatchDropout(0.5)


class Watch(TrainerCallback):
    """A callback that records the tokens of the last block, in training and in evaluation."""

    def __init__(self, last):
        self.lengths = []
        last.mlp.register_forward_pre_hook(
            lambda module, args: self.lengths.append((module.training, args[0].shape[1]))
        )

    def tokens(self, training=True):
        """Return the numbers of tokens seen in training, or in evaluation."""
        return [tokens for mode, tokens in self.lengths if mode is training]


def dataset(size=16):
    torch.manual_seed(3)
    return [{"pixel_values": torch.randn(3, 48, 48), "labels": i % 5} for i in range(size)]


def pairs(rows):
    """Collate images and texts that depend on them, for a whole model that returns its loss."""
    images = default_data_collator(rows)["pixel_values"]
    texts = (images.flatten(1)[:, :8] * 20).long().clamp(-24, 24) + 24
    texts[:, -1] = 49
    return {"pixel_values": images, "input_ids": texts, "return_loss": True}


def classifier():
    torch.manual_seed(1)
    model = hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5)
    return model, model.vit.layers[-1]


def whole():
    torch.manual_seed(1)
    model = hf_clip()
    return model, model.vision_model.encoder.layers[-1]


def run(folder, callback, make=classifier, *, resume=None, **options):
    """Train for five steps; return the model and its `Watch`."""
    model, last = make()
    watch = Watch(last)
    defaults = {"max_steps": 5, "per_device_train_batch_size": 2, "use_cpu": True, "seed": 0}
    defaults |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(folder), **(defaults | options))
    trainer = Trainer(
        model,
        args,
        data_collator=pairs if make is whole else None,
        train_dataset=dataset(),
        eval_dataset=dataset(2),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, watch


@pytest.mark.parametrize(
    ("callback", "reduced"),
    [
        (lambda: ReductionCallback(HALF), 5),
        (lambda: ReductionCallback(HALF, until=0.8), 4),
        (lambda: ReductionCallback(PatchDropout(0.5, until=2)), 2),
        (lambda: ReductionCallback("tome:r=4", until=2), 2),
        (lambda: ReductionCallback(keep=0.7, until=2), 2),
    ],
)
def test_steps_are_reduced_until_the_given_step(callback, reduced):
    callback, model, found = callback(), plain_vit(), []
    for step in range(5):
        state = TrainerState(global_step=step, max_steps=5)
        callback.on_step_begin(None, state, None, model=model)
        found.append(elip_models.reduction_summary(model).keep < 1.0)
    assert found == [True] * reduced + [False] * (5 - reduced)


def test_without_a_strategy_that_of_the_config_is_used():
    model = hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5)
    model.config.elip = settings_of(ToMe(r=2))
    callback = ReductionCallback(until=3)
    for step in range(5):
        state = TrainerState(global_step=step, max_steps=5)
        callback.on_step_begin(None, state, None, model=model)
        strategy = elip_models.reduction_summary(model).strategy
        assert (strategy == ToMe(r=2)) == (step < 3)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def callback():
        return ReductionCallback(ELIP(SCHEDULE, scorer="last"), until=3)

    unstopped, watch = run(tmp_path / "unstopped", callback(), whole)
    assert watch.tokens() == [12] * 3 + [37] * 2
    for stop, expected in ((2, [12, 37, 37]), (4, [37])):
        folder = tmp_path / str(stop)
        run(folder, callback(), whole, save_strategy="steps", save_steps=stop)
        resume = str(folder / f"checkpoint-{stop}")
        resumed, watch = run(folder, callback(), whole, resume=resume)
        assert watch.tokens() == expected
        assert_equal_gradients(resumed.state_dict(), unstopped.state_dict())


@pytest.mark.parametrize(
    ("until", "error"), [(1.5, ValueError), (-1, ValueError), ("end", TypeError), (True, TypeError)]
)
def test_until_is_a_step_or_a_share_of_them(until, error):
    with pytest.raises(error, match=r"until: expected an integer at least 0 or a number in \(0, 1"):
        ReductionCallback("tome", until=until)


def test_a_model_that_cannot_be_reduced_raises_before_the_first_step(tmp_path):
    swin = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[2])
    model = transformers.SwinForImageClassification(swin)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, args, train_dataset=[{}], callbacks=[ReductionCallback("tome")])
    with pytest.raises(TypeError, match="got SwinForImageClassification"):
        trainer.train()
