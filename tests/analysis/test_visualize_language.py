"""`elip visualize --question`: the places of the image tokens that a language model reads."""

import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from elip_models import unreduce_
from elip_models.analysis.visualize import GREY
from elip_models.analysis.visualize_language import (
    open_language_model,
    token_grid,
)
from elip_models.validation import ConfigError
from elip_models.vlm.families import find_multimodal
from tests.helpers.tiers import first_quick
from tests.helpers.tiny_run import elip
from tests.vlm.configs import CASES, IMAGE, VIDEO
from tests.vlm.models import model_of

QUESTION = "how many dogs are there?"
WORDS = ("how", "many", "dogs", "are", "there", "?", "user")
NAMES = {
    "llava": {"image_token": "<image>"},
    "qwen2_5_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    },
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
}


def tokenizer(family):
    """Return a tokenizer of words, whose image token has the id of the tiny models."""
    vocab = {"[UNK]": 0, "[BOS]": 1, **{word: i for i, word in enumerate(WORDS, 3)}}
    names = NAMES[family]
    extra = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    ids = {"image_token": IMAGE, "video_token": VIDEO}
    for i, (name, token) in enumerate(names.items(), 20):
        vocab[token] = ids.get(name, i)
    vocab |= {token: i for i, token in enumerate(extra, 30)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[UNK]",
        extra_special_tokens=names,
        additional_special_tokens=[*names.values(), *extra],
    )


def llava():
    size = {"height": 32, "width": 32}
    pixels = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return hf.LlavaProcessor(
        pixels,
        tokenizer("llava"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def qwen2_5_vl():
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    limits = {"size": {"shortest_edge": 64, "longest_edge": 32 * 48}}
    return hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**sizes, **limits),
        tokenizer("qwen2_5_vl"),
        hf.Qwen2VLVideoProcessor(**sizes, **limits),
        chat_template=(
            "{% for message in messages %}user {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endfor %}"
        ),
    )


def idefics3():
    pixels = hf.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return hf.Idefics3Processor(pixels, tokenizer("idefics3"), image_seq_len=4)


PROCESSORS = {each.__name__: each for each in (llava, qwen2_5_vl, idefics3)}


@pytest.fixture(scope="module", params=first_quick(PROCESSORS))
def folder(request, tmp_path_factory):
    """Save a tiny model with its processor."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model_of(CASES[request.param]()[0], "sdpa").float().save_pretrained(path)
    PROCESSORS[request.param]().save_pretrained(path)
    return path


def picture(x, y, size=(48, 32)):
    """Return a black image with a white square of 8 pixels at (x, y)."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (x, y, x + 8, y + 8))
    return image


def features(model, inputs):
    """Return the image tokens (n, D) that the language model would read."""
    read = []
    handle = find_multimodal(model).language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return read[0][inputs["input_ids"] == IMAGE]


@torch.no_grad()
@pytest.mark.parametrize("place", [(8, 8), (32, 16), (24, 24)])
def test_a_token_is_drawn_where_its_part_of_the_image_is(folder, place):
    opened = open_language_model(str(folder), "stride")
    unreduce_(opened.model)
    bright = opened.inputs(picture(*place), QUESTION)
    tokens = features(opened.model, bright)
    others = features(opened.model, opened.inputs(Image.new("RGB", (48, 32)), QUESTION))
    grid = token_grid(opened, picture(*place), bright, len(tokens))
    changed = (tokens - others).norm(dim=1).view(len(grid.tiles), grid.rows, grid.columns)
    white = F.adaptive_avg_pool2d(grid.tiles.mean(1), (grid.rows, grid.columns))
    lit = [i for i, brightness in enumerate(white) if brightness.max() > 0.1]
    assert lit
    for i in lit:
        assert white[i].flatten()[changed[i].argmax()] == white[i].max()


def test_the_command_writes_a_picture_for_each_image(folder, tmp_path, capsys):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        picture(8, 8).save(file)
    output = tmp_path / "kept.png"
    arguments = ("--model", str(folder), "--question", QUESTION, "--output", str(output))
    assert elip("visualize", *arguments, "--keep", "0.25", *map(str, files)) == 0
    written = sorted(path.name for path in tmp_path.glob("kept*"))
    assert written == ["kept_1.png", "kept_2.png"]
    assert "kept_1.png" in capsys.readouterr().out
    pixels = pil_to_tensor(Image.open(tmp_path / "kept_1.png").convert("RGB")).float() / 255
    assert ((pixels - 0.85 * GREY).abs() < 0.01).all(0).sum() > 100  # dimmed black


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caption", "a dog"], "--caption: expected none with --question"),
        (["--no-pretrained"], "--no-pretrained: expected none with --question"),
        (["--strategy", "tome"], "--strategy: expected one of a language model, diverse"),
        (["--keep", "2.5"], "--keep: expected"),
        (["--keep", "1"], "--strategy: expected one that removes tokens of images"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(folder, tmp_path, capsys, options, message):
    picture(8, 8).save(tmp_path / "a.png")
    arguments = ["--model", str(folder), "--question", QUESTION, str(tmp_path / "a.png")]
    output = tmp_path / "kept.png"
    assert elip("visualize", *arguments, "--output", str(output), *options) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_model_without_places_of_its_tokens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--model: .* for --question"):
        open_language_model(str(tmp_path))
    CASES["llava_next"]()[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="have a place on the image, got llava_next: its proc"):
        open_language_model(str(tmp_path))
    hf.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a multimodal language model, one of aya"):
        open_language_model(f"hf:{tmp_path}")
