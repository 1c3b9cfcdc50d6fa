"""A tiny randomly initialised model of each family, and a batch of prompts for it.

The batch has rows of different text length with padding at the left, a row with one image and one
with two, and text directly behind an image. A model tells how many tokens an image has.
"""

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.vlm.configs import CASES, EAGER_TOWER, IMAGE, PAD, VIDEO

ROWS = ((4, "image", 3), (2, "image", 1, "image", 6))
VIDEO_ROWS = ((4, "video", 2, "image", 3), (2, "image", 5))


def build(
    name: str, attention: str = "sdpa", rows: Any = None, padding: str = "left"
) -> tuple[nn.Module, dict]:
    """Return a model and the inputs of its forward pass."""
    torch.manual_seed(0)
    config, pixels = CASES[name]()
    model = model_of(
        config, {"": "eager", "text_config": attention} if name in EAGER_TOWER else attention
    )
    pixels = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in pixels.items()}
    if rows is None:
        rows = VIDEO_ROWS if "pixel_values_videos" in pixels else ROWS
    return model, pixels | prompt(model, pixels, rows, padding)


def model_of(config: Any, attention: str | dict) -> nn.Module:
    """Return a model, in fp64 if it has SDPA; eager attention gives padding NaN in fp64.

    Weights are larger than in training, so that attention is not a mean.
    """
    kind = hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = kind._from_config(config, attn_implementation=attention).eval()
    if config.get_text_config()._attn_implementation == "sdpa":
        model.double()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.generation_config.eos_token_id = None
    return model


def prompt(model: nn.Module, pixels: dict, rows: Any, padding: str = "left") -> dict:
    """Return the ids and masks of a batch, with as many image tokens as the model has features."""
    lengths = {"image": iter(feature_counts(model, pixels, rows, "image"))}
    lengths["video"] = iter(feature_counts(model, pixels, rows, "video"))
    frames = 3 if model.config.model_type == "qwen3_vl" else 1  # it separates these by text
    lines = []
    for row in rows:
        line: list[int] = []
        for part in row:
            if part == "video":
                frame = [VIDEO] * (next(lengths[part]) // frames)
                line += [token for _ in range(frames) for token in text(1) + frame]
            else:
                line += image(model, next(lengths[part])) if part == "image" else text(part)
        lines.append(line)
    longest = max(map(len, lines))
    pads = [[PAD] * (longest - len(line)) for line in lines]
    pairs = zip(pads, lines, strict=True) if padding == "left" else zip(lines, pads, strict=True)
    ids = torch.tensor([first + second for first, second in pairs])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()} | types(model, ids)


def types(model: nn.Module, ids: Tensor) -> dict:
    """Return the types of tokens, where a family has them."""
    family = model.config.model_type
    if family.startswith("qwen"):
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    if family == "gemma3":
        return {"token_type_ids": (ids == IMAGE).long()}
    if family == "paligemma":  # the last two tokens are the causal suffix
        suffix = torch.arange(ids.shape[1]) >= ids.shape[1] - 2
        return {"token_type_ids": suffix.expand_as(ids).long()}
    return {}


def image(model: nn.Module, count: int) -> list[int]:
    """Return the ids of an image, behind the token by which Qwen-VL counts images."""
    start = [102] if model.config.model_type.startswith("qwen") else []
    return [*start, *[IMAGE] * count]


def text(count: int) -> list[int]:
    """Return random ids of text."""
    return torch.randint(3, 90, (count,)).tolist()


@torch.no_grad()
def feature_counts(model: nn.Module, pixels: dict, rows: Any, kind: str) -> list[int]:
    """Return the number of tokens of each image or video in the rows."""
    count = sum(row.count(kind) for row in rows)
    if count == 0:
        return []
    if (model.config.model_type, kind) == ("llava_onevision", "video"):
        return [17] * count  # four frames of four tokens, and one that ends them
    find = getattr(model.model, f"get_{kind}_features", model.model.get_image_features)
    mains = {"video": ("pixel_values_videos",), "image": ("pixel_values", "pixel_values_images")}
    main = next(name for name in mains[kind] if name in pixels)
    others = ("video_grid_thw",) if kind == "video" else ("image_grid_thw", "image_sizes")
    settings = {name: pixels[name] for name in others if name in pixels}
    features = find(pixels[main], **settings, return_dict=True).pooler_output
    sizes = [each.shape[:-1].numel() for each in features]
    return sizes if len(sizes) == count else [sum(sizes) // count] * count
