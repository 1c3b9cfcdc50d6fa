"""A tiny randomly initialised model of each family, and a batch of prompts for it.

The batch has rows of different text length with padding at the left, a row with one image and one
with two, and text directly behind an image. A model tells how many tokens an image has.
"""

from inspect import signature
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from elip_models.vlm.clips import FRAMES_APART
from elip_models.vlm.families import find_multimodal
from tests.vlm.configs import CASES, EAGER_TOWER, IMAGE, PAD, VIDEO

MoeCausalLMOutputWithPast.image_outputs = None  # Llama 4 of transformers 5.24 reads it
for module in (modeling_qwen3_5, modeling_qwen3_5_moe):  # one algorithm with and without a cache
    module.torch_chunk_gated_delta_rule = module.torch_recurrent_gated_delta_rule

ROWS = ((4, "image", 3), (2, "image", 1, "image", 6))
VIDEO_ROWS = ((4, "video", 2, "image", 3), (2, "image", 5))
COUNTED = ("ernie", "glm", "paddleocr", "qwen")
"""How the types of models begin that count images by the token in front of each."""


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
    settings = {"attn_implementation": attention, "experts_implementation": "eager"}
    model = kind._from_config(config, **settings).eval()
    if config.get_text_config()._attn_implementation == "sdpa":
        model.double()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    if config.model_type == "gemma4":  # which finds the ids of embeddings, of padding by zeros
        nn.init.zeros_(model.get_input_embeddings().weight[PAD])
    model.generation_config.eos_token_id = None
    return model


def prompt(model: nn.Module, pixels: dict, rows: Any, padding: str = "left") -> dict:
    """Return the ids and masks of a batch, with as many image tokens as the model has features."""
    lengths = {"image": iter(feature_counts(model, pixels, rows, "image"))}
    lengths["video"] = iter(feature_counts(model, pixels, rows, "video"))
    frames = 3 if model.config.model_type in FRAMES_APART else 1
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


def one_row(inputs: dict, row: int) -> dict:
    """Return the inputs of one row of `build`, without padding and with its own images."""
    width, real = inputs["input_ids"].shape[1], inputs["attention_mask"][row].bool()
    images = slice(0, 1) if row == 0 else slice(1, None)
    alone = {}
    for key, value in inputs.items():
        if value.shape[-1] == width and len(value) == 2:
            alone[key] = value[row : row + 1, real]
        elif f"{key.replace('pixel_values', 'image')}_grid_thw" in inputs and "pixel" in key:
            sizes = inputs["image_grid_thw"].prod(1).tolist()
            alone[key] = torch.cat(value.split(sizes)[images])
        elif key == "image_token_pooling":  # before transformers 5.25, patches of all images
            patches = 0 if "image_num_crops" in inputs else inputs["pixel_values"].shape[1]
            alone[key] = value.view(3, -1, 4)[images].flatten(0, 1) - images.start * patches
        elif "video" not in key:
            alone[key] = value[images]
        elif row == 0:
            alone[key] = value
    return alone


def pixels_of(inputs: dict) -> dict:
    """Return what describes images among the inputs of a model."""
    names = {"input_ids", "attention_mask", "inputs_embeds"}
    return {k: v for k, v in inputs.items() if k not in names and not k.endswith("type_ids")}


def types(model: nn.Module, ids: Tensor) -> dict:
    """Return the types of tokens, where a family has them."""
    family = model.config.model_type
    if family.startswith(("qwen", "glm", "paddleocr")) and "omni" not in family:
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    if family == "ernie4_5_vl_moe":
        is_image = (ids == IMAGE).int()
        return {"mm_token_type_ids": is_image, "moe_mm_token_type_ids": is_image}
    if family in ("gemma4", "molmo2"):
        return {"mm_token_type_ids": (ids == IMAGE).long()}
    if family in ("gemma3", "shieldgemma2"):
        return {"token_type_ids": (ids == IMAGE).long()}
    if family == "paligemma":  # the last two tokens are the causal suffix
        suffix = torch.arange(ids.shape[1]) >= ids.shape[1] - 2
        return {"token_type_ids": suffix.expand_as(ids).long()}
    return {}


def image(model: nn.Module, count: int) -> list[int]:
    """Return the ids of an image, behind the token by which some families count images."""
    start = [102] if model.config.model_type.startswith(COUNTED) else []
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
    core = find_multimodal(model).model
    find = getattr(core, f"get_{kind}_features", core.get_image_features)
    mains = {"video": ("pixel_values_videos",), "image": ("pixel_values", "pixel_values_images")}
    main = next(name for name in mains[kind] if name in pixels)
    settings = {
        name: pixels[name]
        for name in signature(find).parameters
        if name in pixels and not name.startswith("pixel_values")
    }
    output = find(pixels[main], **settings, return_dict=True)
    features = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    sizes = [each.shape[:-1].numel() for each in features]
    return sizes if len(sizes) == count else [sum(sizes) // count] * count
