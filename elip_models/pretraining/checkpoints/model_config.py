"""A model's config from a checkpoint: sizes from tensor shapes, other fields from its config file.

The number of heads does not follow from weights: a head is 64 wide, unless a config differs.
"""

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from elip_models.images import CLIP_MEAN, CLIP_STD
from elip_models.pretraining.models.meter.config import ROBERTA
from elip_models.pretraining.models.registry import FAMILIES
from elip_models.saving.files import read_object
from elip_models.saving.meta_build import check_config, library_errors

HEAD_WIDTH = 64
OPEN_CLIP_CONFIG = "open_clip_config.json"
SIZES = (
    ("vision_width", "visual.pos_embed", -1),
    ("vision_hidden", "visual.blocks.0.mlp.fc1.weight", 0),
    ("patch_size", "visual.patch_embed.proj.weight", -1),
    ("embed_dim", "image_projection.weight", 0),
    ("text_width", "text.embeddings.word_embeddings.weight", 1),
    ("text_hidden", "text.layers.0.intermediate.dense.weight", 0),
    ("vocab_size", "text.embeddings.word_embeddings.weight", 0),
    ("max_positions", "text.embeddings.position_embeddings.weight", 0),
    ("text_width", "text.transformer.embeddings.token_embedding.weight", 1),
    ("text_hidden", "text.transformer.encoder.layers.0.mlp.fc1.weight", 0),
    ("vocab_size", "text.transformer.embeddings.token_embedding.weight", 0),
    ("context_length", "text.transformer.embeddings.position_embedding.weight", 0),
    ("cross_width", "text_transform.weight", 0),
    ("cross_hidden", "text_layers.layers.0.intermediate.dense.weight", 0),
    ("queue_size", "queue.image", 1),
)
"""Field of a config, and the tensor and dim with its value, without the prefix `encoders.`."""
LAYERS = {
    "vision_depth": r"visual\.blocks\.(\d+)\.",
    "text_depth": r"text\.(?:transformer\.encoder\.)?layers\.(\d+)\.",
    "cross_depth": r"text_layers\.layers\.(\d+)\.",
}
SUPPORTED = (
    ("vision_cfg", "pool_type", ("tok",)),
    ("vision_cfg", "act_kwargs", ()),
    ("text_cfg", "pool_type", ("argmax", "eos")),
    ("text_cfg", "act_kwargs", ()),
    ("text_cfg", "no_causal_mask", (False,)),
)
"""Settings of open_clip that no tensor shows, and the values beside None that our CLIP has."""


def sizes_from_weights(family: str, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of the config that follow from the shapes of weights under our names."""
    config = FAMILIES[family].config_class()
    shapes = {_tower_name(name): tuple(weight.shape) for name, weight in weights.items()}
    sizes: dict[str, Any] = {
        field: shapes[name][dim]
        for field, name, dim in SIZES
        if len(shapes.get(name, ())) > max(dim, 0)
    }
    for field, layer in LAYERS.items():
        numbers = [int(match[1]) for name in shapes if (match := re.match(layer, name))]
        sizes |= {field: max(numbers) + 1} if numbers else {}
    for part in ("vision", "text"):
        hidden, width = (sizes.get(f"{part}_{size}") for size in ("hidden", "width"))
        if hidden and width:
            ratio = hidden / width
            exact = int(width * ratio) == hidden
            sizes[f"{part}_mlp_ratio"] = ratio if exact else math.nextafter(ratio, math.inf)
    if "patch_size" in sizes and len(shapes.get("visual.pos_embed", ())) > 1:
        grid = math.isqrt(max(shapes["visual.pos_embed"][-2] - 1, 0))
        sizes["image_size"] = grid * sizes["patch_size"]
    crossing = r"text\.layers\.(\d+)\.crossattention\."
    fusing = [int(match[1]) for name in shapes if (match := re.match(crossing, name))]
    sizes |= {"text_layers": min(fusing)} if fusing else {}
    unused = 0
    if shapes.get("text.embeddings.token_type_embeddings.weight", (2,))[:1] == (1,):
        sizes, unused = ROBERTA | sizes, ROBERTA["pad_token_id"] + 1
    if "max_positions" in sizes:
        sizes["context_length"] = min(config.context_length, sizes["max_positions"] - unused)
    if family == "clip" and "vocab_size" in sizes:
        sizes["eos_token_id"] = sizes["vocab_size"] - 1
    return {field: size for field, size in sizes.items() if field in vars(config)}


def _tower_name(name: str) -> str:
    """Drop the prefix of encoders; a captioning checkpoint has a decoder and no text encoder."""
    return re.sub(r"^decoder\.", "text.", name).removeprefix("encoders.")


def default_heads(sizes: dict[str, Any]) -> dict[str, int]:
    """Return the number of heads of each part in `sizes` that has a width and no heads."""
    heads = {}
    for part in ("vision", "text", "cross"):
        width = sizes.get(f"{part}_width")
        if width is not None and f"{part}_heads" not in sizes:
            if width % HEAD_WIDTH:
                raise ValueError(
                    f"{part}_heads: expected a width that is a multiple of {HEAD_WIDTH}, the width "
                    f"of a head in the official models, got {width}; pass {part}_heads=.."
                )
            heads[f"{part}_heads"] = width // HEAD_WIDTH
    return heads


def fields_from_config(kind: str, folder: Path, vocab_size: int) -> dict[str, Any]:
    """Return the fields of our config that follow from the library's config in a folder, if any."""
    path, images = folder / "config.json", folder / "preprocessor_config.json"
    if images.is_file():
        stats = read_object(images)
        _check_stats(images, stats.get("image_mean"), stats.get("image_std"))
    if kind == "hf_clip" and path.is_file():
        with library_errors(path, "a config of transformers"):
            check_config(path, read_object(path))
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            fields = _hf_fields(config)
    elif (path := folder / OPEN_CLIP_CONFIG).is_file():
        fields = _open_clip_fields(path)
    else:
        return {}
    return {  # configs keep default ids beyond a small vocabulary
        name: value
        for name, value in fields.items()
        if not name.endswith("_token_id") or not _is_unused(value, vocab_size)
    }


def _is_unused(token_id: Any, vocab_size: int) -> bool:
    return token_id is None or (isinstance(token_id, int) and not 0 <= token_id < vocab_size)


def _hf_fields(config: Any) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act:
        raise ValueError(
            f"expected activation {text.hidden_act!r} in both towers, got {vision.hidden_act!r}"
        )
    fields = {
        "vision_heads": vision.num_attention_heads,
        "text_heads": text.num_attention_heads,
        "vision_norm_eps": vision.layer_norm_eps,
        "text_norm_eps": text.layer_norm_eps,
        "pad_token_id": text.pad_token_id,
        "activation": text.hidden_act,
    }
    # in transformers, 2 means the highest id of each text
    return fields | ({} if text.eos_token_id == 2 else {"eos_token_id": text.eos_token_id})


def _open_clip_fields(path: Path) -> dict[str, Any]:
    content = read_object(path)
    with library_errors(path, "a config of open_clip"):
        images, model = content.get("preprocess_cfg", {}), content["model_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        for tower, name, values in SUPPORTED:
            if model[tower].get(name) not in (None, *values):
                expected = " or ".join(map(repr, values or (None,)))
                raise ValueError(f"{name} = {expected}, got {model[tower][name]!r}")
        fields = {
            "vision_heads": vision.get("width", 768) // vision.get("head_width", HEAD_WIDTH),
            "text_heads": text.get("heads", 8),
            "vision_norm_eps": vision.get("norm_kwargs", {}).get("eps", 1e-5),
            "text_norm_eps": text.get("norm_kwargs", {}).get("eps", 1e-5),
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "pad_token_id": text.get("pad_id", 0),
        }
        if text.get("pool_type") == "eos":
            fields["eos_token_id"] = text.get("eos_id", 2)
        if images.get("resize_mode") == "squash":
            fields["resize"] = "squash"
    _check_stats(path, images.get("mean"), images.get("std"))
    return fields


def _check_stats(path: Path, mean: Any, std: Any) -> None:
    for name, theirs, ours in (("mean", mean, CLIP_MEAN), ("std", std, CLIP_STD)):
        if theirs is not None and not _is_close(theirs, ours):
            raise ValueError(
                f"source: expected the {name} {ours} of images in {path}, as in our models, got "
                f"{theirs}; pass only the weight file to convert it all the same"
            )


def _is_close(theirs: Any, ours: tuple[float, ...]) -> bool:
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return False
    pairs = zip(theirs, ours, strict=True)
    return all(isinstance(value, float) and abs(value - own) < 1e-3 for value, own in pairs)
