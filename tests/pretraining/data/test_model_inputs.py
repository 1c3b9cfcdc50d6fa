"""Preprocessing of captions and images, as in the original code of each model."""

import typing

import numpy as np
import pytest
import torch
from PIL import Image

from elip_models.pretraining.data import (
    ImageTextPreparation,
    Sample,
    image_transform,
    tokenize,
)
from elip_models.pretraining.data.caption_rules import CaptionRule, apply_caption_rule
from elip_models.pretraining.data.transforms import ResizeMode
from elip_models.pretraining.models.config import VisionConfig
from elip_models.pretraining.models.registry import create_model, load_model
from elip_models.pretraining.tasks.task import evaluation_transform
from elip_models.pretraining.training.run_config import DataConfig
from elip_models.pretraining.training.trainer import train
from tests.helpers.tiny_run import own_process, tiny_config

WORDS = " ".join(f"w{number}" for number in range(40))


@pytest.mark.parametrize(
    ("caption", "albef", "blip"),
    [
        ("A Dog.", "a dog", "a dog"),
        ("A dog, a cat", "a dog a cat", "a dog, a cat"),
        ("the dog's toy", "the dogs toy", "the dog's toy"),
        ("what? (a toy!)", "what a toy", "what? a toy"),
        (
            "a red-brown and/or black dog",
            "a red brown and or black dog",
            "a red-brown and/or black dog",
        ),
        ("<PERSON> in front of a car", "person in front of a car", "<person> in front of a car"),
        ('at 10:30; #1 ~ "best" *', "at 1030 1 best", "at 10 30 1 best"),
        ("U.S.A", "usa", "u s a"),
        (" a  dog \n", "a dog", "a dog"),
        ("...", "", ""),
        ("Café 🐶", "café 🐶", "café 🐶"),
        (WORDS, WORDS.rpartition(" w30")[0], WORDS.rpartition(" w30")[0]),
    ],
)
def test_example(caption, albef, blip):
    assert apply_caption_rule(caption, "albef") == albef
    assert apply_caption_rule(caption, "blip") == blip
    assert apply_caption_rule(caption, "plain") == caption


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is at 10:30?", "what is at 1030?"),
        ("U.S.A; (a  big) dog", "usa a big dog"),
        (WORDS, WORDS.rpartition(" w30")[0]),
    ],
)
def test_questions_of_blip_lose_characters(question, expected):
    """pre_question of BLIP's data/utils.py; pre_caption replaces the same characters by spaces."""
    assert apply_caption_rule(question, "blip_question") == expected


def test_configs_list_all_caption_rules_and_resize_modes():
    hints = typing.get_type_hints(VisionConfig)
    assert hints["captions"] == CaptionRule and hints["resize"] == ResizeMode
    hints = typing.get_type_hints(DataConfig, include_extras=True)
    assert hints["captions"] == CaptionRule | None and hints["resize"] == ResizeMode | None


@pytest.mark.parametrize(
    ("name", "resize", "rule"),
    [
        ("clip_tiny", "crop", "plain"),
        ("albef_tiny", "squash", "albef"),
        ("blip_tiny", "squash", "blip"),
        ("meter_tiny", "crop", "plain"),
    ],
)
def test_each_model_preprocesses_as_its_original(name, resize, rule, tokenizer):
    model = create_model(name, vocab_size=len(tokenizer))
    assert (model.config.resize, model.config.captions) == (resize, rule)
    for caption in ("A dog, (the big one)", WORDS):
        for max_words in (30, 4):
            model = create_model(name, vocab_size=len(tokenizer), max_words=max_words)
            expected = tokenize(tokenizer, [apply_caption_rule(caption, rule, max_words)], 32)
            found = model.tokenise(tokenizer, [caption])["input_ids"]
            assert torch.equal(found, expected["input_ids"])


@pytest.mark.parametrize(
    ("rule", "max_words", "text"),
    [("albef", 30, "a dog a cat"), ("albef", 2, "a dog"), ("blip", 30, "a dog, a cat")],
)
def test_training_reads_captions_by_the_rule(rule, max_words, text, tokenizer):
    options = {"context_length": 32, "captions": rule, "max_words": max_words}
    prepare = ImageTextPreparation(image_transform(8, train=False), tokenizer, **options)
    sample = Sample(Image.new("RGB", (8, 8)), ("A dog, a cat",), "a")
    ids = prepare(sample, 0, np.random.default_rng(0))["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_evaluation_resizes_as_the_config_says(resize, tokenizer):
    model = create_model("blip_tiny", vocab_size=len(tokenizer), resize=resize)
    wide = Image.new("RGB", (96, 32), "white")
    marked = wide.copy()
    marked.paste("red", (0, 0, 30, 32))  # which a centre crop does not show
    first, second = map(evaluation_transform(model), (wide, marked))
    assert torch.equal(first, second) == (resize == "crop")


def test_a_recipe_overrides_the_preprocessing_and_the_saved_model_keeps_it(tmp_path):
    with own_process():
        train(tiny_config(tmp_path / "own", "optim.steps=1", recipe="albef_tiny"))
        settings = ("data.captions=plain", "data.resize=crop")
        train(tiny_config(tmp_path / "other", "optim.steps=1", *settings, recipe="albef_tiny"))
    own, other = (load_model(tmp_path / name / "model").config for name in ("own", "other"))
    assert (own.captions, own.resize) == ("albef", "squash")
    assert (other.captions, other.resize) == ("plain", "crop")
