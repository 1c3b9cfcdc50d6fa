"""`elip visualize` on every kind of model, guided by its own text or by vision only."""

import json

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from elip_models.analysis import visualize_inputs
from elip_models.analysis.visualize_inputs import open_visualized_model, read_pairs
from elip_models.engine.encode import encode_image
from elip_models.pretraining.data import load_tokenizer, tokenize
from elip_models.pretraining.models.clip.model import CLIP
from elip_models.pretraining.models.registry import create_model
from elip_models.validation import ConfigError
from tests.helpers.models import hf_blip, hf_clip
from tests.helpers.own_warnings import NO_IMAGE_STATS
from tests.helpers.tiers import slow_except
from tests.helpers.tiny_run import elip
from tests.towers.test_image_text import guidance_of

CAPTIONS = ["a red dog on the left", "two cats"]
SIX = "2(100%) 2(70%) 2(40%)"


@pytest.fixture(scope="module")
def small_tokenizer(captions):
    """Train a tokenizer with the vocabulary size of the tiny text towers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    words = sorted({word for text in [*captions, *CAPTIONS] for word in text.split()})[:45]
    vocab = {"[UNK]": 0, "[CLS]": 1, "[PAD]": 2, **{w: i for i, w in enumerate(words, 3)}}
    vocab["[SEP]"] = 49
    model = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 49)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=model, **names, eos_token="[SEP]")


@pytest.fixture
def files(tmp_path):
    """Write two images, one of which is wide."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, ((64, 64), (90, 50)), strict=True):
        Image.effect_noise(size, 80).convert("RGB").save(path)
    return paths


@pytest.fixture
def pairs(files):
    return read_pairs(files, CAPTIONS)


def normalised(pictured, pairs):
    return pictured.normalised(pictured.pixels([image for image, _ in pairs]))


def our_folder(folder, tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    sizes = {"image_size": 32, "vision_depth": 6, "vocab_size": 600, "context_length": 24}
    model = create_model("elip_clip_tiny", **sizes, **ids, schedule=SIX, scorer="last")
    model.save_pretrained(folder, tokenizer)
    return str(folder)


def kept(infos):
    return [info.reduction.kept for info in infos]


def differ(infos, others):
    return any(not torch.equal(a, b) for a, b in zip(kept(infos), kept(others), strict=True))


def test_our_clip_is_guided_by_its_own_text(tmp_path, tokenizer, pairs):
    pictured = open_visualized_model(our_folder(tmp_path / "model", tokenizer))
    assert str(pictured).endswith(f"{SIX}, scorer last, text-guided, fusion 0.8")
    images = normalised(pictured, pairs)
    infos = pictured.stage_infos(images, CAPTIONS)
    assert [info.stage.keep for info in infos] == [11, 6]
    text = tokenize(load_tokenizer(str(tmp_path / "model")), CAPTIONS, 24)
    clip = CLIP.from_pretrained(tmp_path / "model").eval()
    _, expected = encode_image(
        clip.visual,
        images,
        clip.guidance(clip.encode_text(**text)),
        strategy=clip.reduction,
        return_info=True,
    )
    assert not differ(infos, expected)


@NO_IMAGE_STATS
@pytest.mark.parametrize("make", [hf_clip, hf_blip])
def test_models_of_transformers_are_guided_by_their_text_tower(
    make, tmp_path, small_tokenizer, pairs
):
    model = make().eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"--model: expected a tokenizer .* elip:fusion=1"):
        open_visualized_model(f"hf:{tmp_path}", schedule=SIX)
    assert open_visualized_model(f"hf:{tmp_path}", strategy="elip:fusion=1").guide is None
    small_tokenizer.save_pretrained(tmp_path)
    pictured = open_visualized_model(f"hf:{tmp_path}", schedule=SIX)
    images = normalised(pictured, pairs)
    equal = [CAPTIONS[1]] * 2  # as long as each other: no padding
    ids = small_tokenizer(equal, return_tensors="pt").input_ids
    torch.testing.assert_close(pictured.guide(equal), guidance_of(model, ids))
    padded = pictured.guide(CAPTIONS)[1]
    torch.testing.assert_close(padded, pictured.guide(equal)[1], atol=1e-5, rtol=1e-5)
    assert len(pictured.stage_infos(images, CAPTIONS)) == 2
    long = pictured.guide(["two cats " * 20] * 2)
    assert long.shape == (2, pictured.tower.width)


@pytest.mark.slow
def test_the_command_draws_two_pictures(tmp_path, tokenizer, files, capsys):
    model = our_folder(tmp_path / "model", tokenizer)
    output = tmp_path / "kept.png"
    data = ["--data", "emoji_scenes:seed=1,size=5", "--count", 2]
    assert elip("visualize", "--model", model, *data, "--output", output) == 0
    others = [tmp_path / "kept_merged.png", tmp_path / "kept_concentration.png"]
    assert capsys.readouterr().out.split() == [str(output), *map(str, others)]
    assert Image.open(output).width > Image.open(output).height > 400
    assert all(path.is_file() for path in others)
    entries = [{"image": "gone.png", "caption": "a"}, {"image": "b.png", "caption": ["b", "c"]}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    data = ["--data", tmp_path / "list.json", "--strategy", "elip:fusion=1"]
    assert elip("visualize", "--model", model, *data, "--output", output) == 0


MERGES = ["tome", "guided_tome:fusion=1"]


@pytest.mark.parametrize("strategy", slow_except(MERGES[:1], MERGES))
def test_a_strategy_without_scores_is_drawn_by_what_it_merges(strategy, tmp_path, files, capsys):
    output, model = tmp_path / "merged.png", ["--model", "clip_tiny", "--no-pretrained"]
    shown = ["--image", files[0], "--caption", "a", "--strategy", strategy, "--keep", 0.7]
    assert elip("visualize", *model, *shown, "--output", output) == 0
    second = tmp_path / "merged_concentration.png"
    assert capsys.readouterr().out.split() == [str(output), str(second)]
    assert Image.open(output).width > 2 * Image.open(output).height > 400


def test_an_image_needs_a_caption_only_if_a_text_guides(tmp_path, files, monkeypatch, capsys):
    arguments = [*TINY, "--image", files[0], "--output", tmp_path / "a.png"]
    assert elip("visualize", *arguments, "--strategy", "tome", "--keep", 0.7) == 0
    assert (tmp_path / "a.png").is_file()
    monkeypatch.setattr(visualize_inputs, "_guide_of", lambda *_: lambda captions: None)
    assert elip("visualize", *arguments) == 2
    error = capsys.readouterr().err
    assert "--caption: expected one for each --image, 1, got none; --strategy tome" in error


TINY = ["--model", "clip_tiny", "--no-pretrained"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY], "--image: expected images, or else --data"),
        ([*TINY, "--image", "no.png", "--caption", "a"], "--image: no.png: no such file"),
        ([*TINY, "--data", "no.json"], "--model: expected a tokenizer beside the model"),
        ([*TINY, "--data", "a.json", "--output", "a.pdf"], "--output: expected a name ending in"),
        (
            [*TINY, "--data", "a.json", "--output", "no/a.png"],
            "--output: expected a file in a folder",
        ),
        ([*TINY, "--data", "a.json", "--strategy", "tom"], "--strategy: expected NAME"),
        (
            [*TINY, "--data", "emoji_scenes:size=1", "--strategy", "patch_dropout"],
            "--strategy: expected one that merges or drops tokens in inference",
        ),
        (["--model", "clip_tiny", "--data", "a.json"], "--model: pretrained: expected False"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert elip("visualize", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
