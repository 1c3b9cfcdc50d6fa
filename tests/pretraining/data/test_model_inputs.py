"""Preprocessing of captions and images, as in the original code of each model."""

import typing

import pytest
import torch
from PIL import Image

from elip_models.pretraining.data import (
    EmojiScenes,
    ImageTextPreparation,
    TrainingSamples,
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


def test_training_reads_captions_by_the_rule(tokenizer):
    def words(**options):
        scenes, transform = EmojiScenes(4, image_size=16), image_transform(16, train=False)
        prepare = ImageTextPreparation(transform, tokenizer, context_length=32, **options)
        dataset = TrainingSamples(scenes, prepare, seed=0)
        ids = [dataset[turn, index]["input_ids"] for turn in range(5) for index in range(4)]
        return [tokenizer.decode(text, skip_special_tokens=True).split() for text in ids]

    cut = [text[:3] for text in words(captions="albef")]
    assert words(captions="albef", max_words=3) == cut
    for rule in ("albef", "blip"):
        assert any("," in word for text in words(captions=rule) for word in text) == (
            rule == "blip"
        )


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
