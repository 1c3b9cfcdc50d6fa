"""Preparation of samples as in the original code of each model: captions, images, tokenizers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elip_models.pretraining.data import (
    Sample,
    image_transform,
    load_tokenizer,
    tokenize,
    train_tokenizer,
)
from elip_models.pretraining.data.caption_rules import apply_caption_rule
from elip_models.pretraining.data.tokenizer import MIN_VOCAB_SIZE
from elip_models.pretraining.models.config import VisionConfig
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.tasks.task import (
    Preprocessor,
    evaluation_transform,
    image_with_caption,
)

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
            tokens = model.tokenise(tokenizer, [caption])
            assert torch.equal(tokens["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("rule", "max_words", "text"),
    [("albef", 30, "a dog a cat"), ("albef", 2, "a dog"), ("blip", 30, "a dog, a cat")],
)
def test_training_reads_captions_by_the_rule(rule, max_words, text, tokenizer):
    sample = Sample(Image.new("RGB", (8, 8)), ("A dog, a cat",), "a")
    config = VisionConfig(captions=rule, max_words=max_words)
    preprocessor = Preprocessor([sample], image_transform(8, train=False), tokenizer, config, 32)
    ids = image_with_caption(preprocessor, sample, 0, np.random.default_rng(0))["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_evaluation_resizes_as_the_config_says(resize, tokenizer):
    model = create_model("blip_tiny", vocab_size=len(tokenizer), resize=resize)
    wide = Image.new("RGB", (96, 32), "white")
    marked = wide.copy()
    marked.paste("red", (0, 0, 30, 32))  # which a centre crop does not show
    first, second = map(evaluation_transform(model), (wide, marked))
    assert torch.equal(first, second) == (resize == "crop")


@pytest.mark.parametrize("option", ["resize", "randaugment_policy"])
def test_an_unknown_name_raises(option):
    with pytest.raises(ValueError, match=f"{option}: expected one of .*, got 'squish'"):
        image_transform(8, train=True, **{option: "squish"})


def test_training_never_mirrors_left_and_right():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 16, 32))
    transform = image_transform(32, train=True)
    for _ in range(50):
        tensor = transform(image)
        assert tensor[:, :, 0].min() > tensor[:, :, -1].max()


def augmented(image, seed=0, **options):
    torch.manual_seed(seed)
    return image_transform(32, train=True, **options)(image)


def test_augmentations_are_drawn_by_torch_s_generator_and_for_training_alone():
    image = Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    plain = augmented(image, scale=None)
    assert torch.equal(plain, image_transform(32, train=False)(image))
    options = {"scale": None, "flip": True, "randaugment": (2, 7)}
    assert torch.equal(augmented(image, **options), augmented(image, **options))
    drawn = [augmented(image, seed, **options) for seed in range(8)]
    assert len({tensor.sum().item() for tensor in drawn}) == 8
    assert torch.equal(image_transform(32, train=False, **options)(image), plain)
    flipped = [augmented(image, seed, scale=None, flip=True) for seed in range(8)]
    mirrored = [torch.equal(tensor, plain.flip(2)) for tensor in flipped]
    assert 0 < sum(mirrored) < 8
    assert all(torch.equal(t, plain) for t, m in zip(flipped, mirrored, strict=True) if not m)


def test_tokenizer_round_trip(tokenizer, captions, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(captions[:50]).input_ids == tokenizer(captions[:50]).input_ids
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    names, expected = "pad bos eos unk cls sep mask", "[PAD] [CLS] [SEP] [UNK] [CLS] [SEP] [MASK]"
    assert [getattr(loaded, f"{name}_token") for name in names.split()] == expected.split()
    assert loaded.pad_token_id == 0


def test_training_a_tokenizer_is_deterministic_and_keeps_to_the_size(tokenizer, captions):
    again = train_tokenizer(iter(captions), 600)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) <= 600
    assert len(train_tokenizer(captions, MIN_VOCAB_SIZE)) == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match=r"vocab_size: expected .* at least 261, got 260"):
        train_tokenizer(captions, MIN_VOCAB_SIZE - 1)


def save_variant(tokenizer, folder: Path, *, post_processor: bool = True, **tokens: str) -> Path:
    """Save the tokenizer with only `tokens` as its special tokens."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if not post_processor:
        model.post_processor = processors.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=model, **tokens).save_pretrained(folder)
    return folder


def test_tokenizers_that_cannot_serve_are_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"name_or_path: expected a folder .*got '.*none'"):
        load_tokenizer(tmp_path / "none")
    endless = save_variant(tokenizer, tmp_path / "a", pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"ends a text .* eos token None"):
        load_tokenizer(endless)
    bare = save_variant(tokenizer, tmp_path / "b", post_processor=False, eos_token="[SEP]")
    with pytest.raises(ValueError, match=r"ends a text .* eos token '\[SEP\]'"):
        load_tokenizer(bare)


@pytest.mark.parametrize("content", ["[]", "3", "", "[" * 100_000, "\xff"], ids=lambda t: t[:5])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_names_the_folder(tmp_path, name, content):
    train_tokenizer(["a red dog", "two cats"] * 9, 300).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"name_or_path: expected a folder .*{tmp_path.name}"):
        load_tokenizer(tmp_path)
