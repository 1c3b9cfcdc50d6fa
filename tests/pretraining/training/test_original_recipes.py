"""Recipes of the paper's models have the original values, or a documented difference."""

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from elip_models.pretraining.training.optim import learning_rate
from elip_models.pretraining.training.recipe import FINETUNE, load_recipe, recipe_names
from tests.helpers.tiers import first_quick

SCRIPT = Path(__file__).parents[3] / "docs" / "recipes.py"
_spec = spec_from_file_location("recipes", SCRIPT)
recipes = module_from_spec(_spec)
_spec.loader.exec_module(recipes)

ORIGINALS = recipes.read_originals()
BEYOND = ORIGINALS.pop("beyond")
NOT_OF_THE_PAPER = {  # what to train on, what touches no gradient, and what no recipe uses
    *("data.train", "data.weights", "data.eval", "data.num_workers", "data.max_bad_share"),
    "data.validation",
    *("model.overrides", "optim.grad_checkpointing", "optim.compile", "data.zero_shot"),
    *("optim.batch_slices", "optim.max_nonfinite_steps"),
    *("model.pretrained", "model.allow_missing", "model.allow_unexpected"),
}


def test_every_recipe_of_the_paper_is_in_the_table():
    assert set(ORIGINALS) == {name for name in recipe_names() if not name.endswith("_tiny")}
    for row in BEYOND:
        assert row.keys() == {"recipes", "what", "original", "ours", "source"}
        assert set(row["recipes"]) <= set(ORIGINALS)


@pytest.mark.parametrize("name", first_quick(ORIGINALS))
def test_every_value_is_the_original_or_a_documented_difference(name):
    values = recipes.ours(name)
    for key, row in ORIGINALS[name].items():
        assert row.keys() <= {"original", "source", "same", "difference"} and row["source"], key
        told = row.keys() & {"same", "difference"}
        if recipes.is_same(values[key], row["original"]):
            assert told in (set(), {"difference"}), f"{key}: its value says that it is the same"
        else:
            assert len(told) == 1, f"{key}: {values[key]!r} is not {row['original']!r}"


@pytest.mark.parametrize("name", ORIGINALS)
def test_no_value_is_left_out(name):
    values = recipes.ours(name)
    skipped = set(NOT_OF_THE_PAPER)
    if values["data.tokenizer"] != "train":
        skipped.add("data.vocab_size")
    if values["data.captions"] == "plain":
        skipped.add("data.max_words")
    if values["data.randaugment"] is None:
        skipped.add("data.randaugment_policy")
    skipped.add("optim.decay_each" if values["optim.decay"] == "step" else "optim.decay_rate")
    of_recipe = {key for key in values if not key.startswith("config.")}
    assert of_recipe - skipped <= ORIGINALS[name].keys()
    config = load_recipe(name, ["data.train=a.json"])
    of_model = {f"config.{key}" for key in config.model.overrides}
    assert of_model <= ORIGINALS[name].keys()


FINETUNING = recipes.read_finetune_originals()
DIFFERENCES = FINETUNING["differences"]
NO_ORIGINAL = {"retrieval_clip"}  # the paper does not fine-tune CLIP for retrieval


def test_every_fine_tuning_recipe_is_compared():
    names = {name.removeprefix(f"{FINETUNE}/") for name in recipe_names(FINETUNE)}
    tiny = {name for name in names if name.endswith("_tiny")}
    assert set(FINETUNING["recipes"]) == names - tiny - NO_ORIGINAL
    for row in DIFFERENCES:
        keys = {"recipes", "key"} if "key" in row else {"recipes", "what", "ours"}
        assert row.keys() == keys | {"original", "source"}
        assert all(recipes.matching([pattern]) for pattern in row["recipes"]), row


@pytest.mark.parametrize("name", FINETUNING["recipes"])
def test_every_fine_tuning_value_is_the_original_or_a_listed_difference(name):
    row, ours = FINETUNING["recipes"][name], recipes.finetune_values(name)
    listed = {each.get("key") for each in DIFFERENCES if name in recipes.matching(each["recipes"])}
    values = row["values"]
    without_original = listed | set(row.get("not_given", ()))
    assert ours.keys() - without_original <= values.keys()
    assert not values.keys() & without_original
    for key, original in values.items():
        if not (isinstance(original, dict) and original.keys() == {"same"}):
            assert key in ours and recipes.is_same(ours[key], original), key


def albef(step):
    """Return a warm-up of ten stairs, each a step late, then a cosine over whole epochs."""
    epoch = step // EPOCH
    if step <= 1000:
        return 1e-5 + 9e-5 * (max(step - 1, 0) // 100) / 10
    return 1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi * epoch / 20))


def blip(step):
    """Return a linear warm-up in the first epoch, then 0.9 of the rate each epoch."""
    if step < 3000:
        return 1e-6 + (1e-4 - 1e-6) * step / 3000
    return max(1e-6, 1e-4 * 0.9 ** (step // EPOCH))


def meter(step):
    """Return a linear warm-up from 0 over a tenth of the steps, then a linear decay to 0."""
    return 1e-5 * (step / 10_000 if step < 10_000 else (100_000 - step) / 90_000)


def open_clip(step):
    """Return a linear warm-up that is above 0 at the first step, then a cosine."""
    if step < 10_000:
        return 1e-3 * (step + 1) / 10_000
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 10_000) / (32 * EPOCH - 10_000)))


EPOCH = 10_000  # steps


@pytest.mark.parametrize(
    ("name", "original", "tolerance"),
    [
        ("albef_4m", albef, 9.1e-6),  # a stair, while it warms up
        ("blip_4m", blip, 1e-12),
        ("meter_4m", meter, 1e-12),
        ("clip_vit_b16_cc12m", open_clip, 1e-12),
    ],
)
def test_learning_rates_are_the_original_ones(name, original, tolerance):
    optim = load_recipe(name, ["data.train=a.json"]).optim
    total = optim.steps or round(optim.epochs * EPOCH)
    for step in (*range(0, 12_000, 7), *range(12_000, total, 991), total - 1):
        ours = learning_rate(step, optim, total_steps=total, steps_per_epoch=EPOCH)
        is_warm = step > optim.warmup_steps
        assert ours == pytest.approx(original(step), rel=0, abs=1e-12 if is_warm else tolerance)
