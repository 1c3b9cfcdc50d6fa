"""`ReductionCallback` sets the reduction of each step of transformers' Trainer, resumed or not."""

import json

import pytest
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import elip_models
from elip_models import ELIP, PatchDropout
from elip_models.api import strategies_in
from elip_models.integrations.hf_trainer import ReductionCallback
from elip_models.vlm.strategies.controls import Stride
from tests.helpers.models import hf_clip, hf_vision
from tests.helpers.towers import SCHEDULE, assert_equal_gradients, plain_vit
from tests.vlm.configs import IMAGE
from tests.vlm.models import build

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


def strategies_by_step(callback, model, steps=4):
    """Return the strategies of the model in each step, and those that its config stores."""
    by_step = []
    for step in range(steps):
        state = TrainerState(global_step=step, max_steps=steps)
        callback.on_step_begin(None, state, None, model=model)
        stored = getattr(model.config, "elip", {})
        names = [saved["strategy"] for saved in stored.get("language_model", [])]
        names += [stored["strategy"]] if "strategy" in stored else []
        by_step.append((sorted(entry.name for entry in strategies_in(model)), sorted(names)))
    return by_step


LANGUAGE = {
    "llava": ("diverse", "fastv:layer=1", "tome"),
    "llava with one": ("fastv:layer=1",),
    "qwen2_vl": ("diverse", "fastv:layer=1"),
    "qwen2_vl as it is": (),
}


@pytest.mark.parametrize("case", LANGUAGE)
def test_a_language_model_keeps_its_strategies_until_the_dense_steps(case, tmp_path):
    model = build(case.split()[0])[0]
    for strategy in LANGUAGE[case]:
        elip_models.reduce_(model, strategy)
    names = [strategy.partition(":")[0] for strategy in LANGUAGE[case] or ("diverse",)]
    *reduced, first, last = strategies_by_step(ReductionCallback(until=2), model)
    assert reduced == [(names, names)] * 2 and first == last == ([], [])
    model.save_pretrained(tmp_path)
    assert "elip" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1", Stride(keep=0.25), "tome"])
def test_a_strategy_of_any_place_reduces_a_language_model(strategy):
    name = strategy.partition(":")[0] if isinstance(strategy, str) else strategy.name
    reduced, *_, dense = strategies_by_step(ReductionCallback(strategy, until=3), build("llava")[0])
    assert reduced == ([name], [name]) and dense == ([], [])


def test_a_trained_language_model_saves_its_reduction_or_none(tmp_path):
    model, inputs = build("llava")
    rows = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"].float()}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(
        model.float(),
        args,
        data_collator=lambda _: rows | {"labels": labels},
        train_dataset=[{}] * 2,
        callbacks=[ReductionCallback(until=1)],
    ).train()
    configs = [json.loads((tmp_path / f"checkpoint-{i}/config.json").read_text()) for i in (1, 2)]
    assert configs[0]["elip"]["language_model"][0]["strategy"] == "diverse"
    assert "elip" not in configs[1]


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
