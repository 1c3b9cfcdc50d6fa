"""A model's config from a checkpoint: sizes from tensor shapes, other fields from its config file.

The number of heads does not follow from weights: a head is 64 wide, unless a config differs.
"""

import math
import re
import reprlib
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from elip_models.images import CLIP_MEAN, CLIP_STD
from elip_models.pretraining.checkpoints.names import Kind
from elip_models.pretraining.models.meter.config import ROBERTA
from elip_models.pretraining.models.registry import FAMILIES
from elip_models.saving.files import read_object
from elip_models.saving.meta_build import LIBRARY_ERRORS
from elip_models.validation import Positive, Size, describe_type, mismatch_error

HEAD_WIDTH = 64
OPEN_CLIP_CONFIG = "open_clip_config.json"
HF_IMAGES = "preprocessor_config.json"
VISION = {
    "vision_width": ("visual.pos_embed", -1),
    "patch_size": ("visual.patch_embed.proj.weight", -1),
}
BERT = {
    "text_width": ("text.embeddings.word_embeddings.weight", 1),
    "text_hidden": ("text.layers.0.intermediate.dense.weight", 0),
    "vocab_size": ("text.embeddings.word_embeddings.weight", 0),
    "max_positions": ("text.embeddings.position_embeddings.weight", 0),
}
PROJECTION = {"embed_dim": ("image_projection.weight", 0)}
ENCODERS = {
    **{field: (f"encoders.{n}", d) for field, (n, d) in (VISION | BERT | PROJECTION).items()},
    "queue_size": ("queue.image", 1),
}
DIMENSIONS: dict[str, dict[str, tuple[str, int]]] = {
    "clip": {
        **VISION,
        **PROJECTION,
        "text_width": ("text.transformer.embeddings.token_embedding.weight", 1),
        "vocab_size": ("text.transformer.embeddings.token_embedding.weight", 0),
        "context_length": ("text.transformer.embeddings.position_embedding.weight", 0),
    },
    "albef": ENCODERS,
    "blip": ENCODERS,
    "meter": {
        **VISION,
        **BERT,
        "cross_width": ("text_transform.weight", 0),
        "cross_hidden": ("text_layers.layers.0.intermediate.dense.weight", 0),
    },
}
"""Family -> field of the config -> tensor and dim with its value."""
ENCODER_LAYERS = {"vision_depth": "encoders.visual.blocks.", "text_depth": "encoders.text.layers."}
LAYERS = {
    "clip": {"vision_depth": "visual.blocks.", "text_depth": "text.transformer.encoder.layers."},
    "albef": ENCODER_LAYERS,
    "blip": ENCODER_LAYERS,
    "meter": {
        "vision_depth": "visual.blocks.",
        "text_depth": "text.layers.",
        "cross_depth": "text_layers.layers.",
    },
}
RATIOS = {
    "vision_mlp_ratio": ("vision_width", "visual.blocks.0.mlp.fc1.weight"),
    "text_mlp_ratio": ("text_width", "text.transformer.encoder.layers.0.mlp.fc1.weight"),
}
UNSET = ("ls_init_value", "act_kwargs", "block_type", "timm_model_name", "hf_model_name")
DISABLED = (
    *("attentional_pool", "no_ln_pre", "final_ln_after_pool", "qk_norm", "scaled_cosine_attn"),
    *("embed_cls", "no_causal_mask", "proj_bias"),
)
OPEN_CLIP_FIXED: dict[str, Any] = {
    **dict.fromkeys(UNSET),
    **dict.fromkeys(DISABLED, False),
    "pos_embed_type": "learnable",
    "proj_type": "linear",
}
"""Settings of an open_clip tower, with the only value that our model supports."""


def sizes_from_weights(family: str, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of the config that follow from the shapes of weights under our names."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if family == "blip":  # a captioning checkpoint has a decoder and no text encoder
        shapes |= {
            name.replace("decoder.", "encoders.text.", 1): shape
            for name, shape in shapes.items()
            if name.startswith("decoder.")
        }
    sizes: dict[str, Any] = {
        name: shapes[tensor][dim]
        for name, (tensor, dim) in DIMENSIONS[family].items()
        if tensor in shapes and -len(shapes[tensor]) <= dim < len(shapes[tensor])
    }
    for name, start in LAYERS[family].items():
        layer = re.compile(re.escape(start) + r"(\d{1,9})\..*")
        numbers = [int(match[1]) for key in shapes if (match := layer.fullmatch(key))]
        sizes |= {name: max(numbers) + 1} if numbers else {}
    for name, (width, tensor) in RATIOS.items():
        hidden = next((s[0] for key, s in shapes.items() if key.endswith(tensor) and s), None)
        if hidden and sizes.get(width):
            sizes[name] = _ratio(hidden, sizes[width])
    grids = (s for n, s in shapes.items() if n.endswith("visual.pos_embed") and len(s) > 1)
    positions = next((shape[-2] for shape in grids), None)
    if positions and "patch_size" in sizes:
        sizes["image_size"] = math.isqrt(positions - 1) * sizes["patch_size"]
    return sizes | _text_fields(family, shapes, sizes)


def _text_fields(family: str, shapes: dict[str, tuple[int, ...]], sizes: dict[str, Any]) -> dict:
    found: dict[str, Any] = {}
    default = FAMILIES[family].config_class()
    if family == "albef":
        cross = re.compile(r"encoders\.text\.layers\.(\d{1,9})\.crossattention\..*")
        fusing = [int(match[1]) for name in shapes if (match := cross.fullmatch(name))]
        found |= {"text_layers": min(fusing)} if fusing else {}
    unused = 0
    if shapes.get("text.embeddings.token_type_embeddings.weight", (2,))[:1] == (1,):
        found |= {name: value for name, value in ROBERTA.items() if name not in sizes}
        unused = ROBERTA["pad_token_id"] + 1
    if "max_positions" in sizes:
        found["context_length"] = min(default.context_length, sizes["max_positions"] - unused)
    if family == "clip" and "vocab_size" in sizes:
        found["eos_token_id"] = sizes["vocab_size"] - 1
    return found


def default_heads(sizes: dict[str, Any]) -> dict[str, int]:
    """Return the number of heads of each part in `sizes` that has a width and no heads."""
    heads = {}
    for part in ("vision", "text", "cross"):
        width = sizes.get(f"{part}_width")
        if width is None or f"{part}_heads" in sizes:
            continue
        if width % HEAD_WIDTH:
            raise ValueError(
                f"{part}_heads: expected a width that is a multiple of {HEAD_WIDTH}, the width of "
                f"a head in the official models, got {width}; pass {part}_heads=.."
            )
        heads[f"{part}_heads"] = width // HEAD_WIDTH
    return heads


def fields_from_config(kind: Kind, folder: Path | None, vocab_size: int) -> dict[str, Any]:
    """Return the fields of our config that follow from the library's config in a folder, if any."""
    if folder is None:
        return {}
    if (folder / HF_IMAGES).is_file():
        images = read_object(folder / HF_IMAGES)
        _check_stats(HF_IMAGES, images.get("image_mean"), images.get("image_std"))
    if kind.architecture is not None and (folder / "config.json").is_file():
        from transformers import AutoConfig

        read_object(folder / "config.json")  # an error of another content names the file
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return _hf_fields(kind.family, config)
        except (*LIBRARY_ERRORS, StrictDataclassError) as error:
            raise ValueError(
                f"source: expected a config of {kind.architecture} in {folder / 'config.json'}, "
                f"got {type(error).__name__}: {str(error)[:300]}"
            ) from error
    if kind.architecture is None and (folder / OPEN_CLIP_CONFIG).is_file():
        described = read_object(folder / OPEN_CLIP_CONFIG)
        images = _object(described, "preprocess_cfg")
        _check_stats(OPEN_CLIP_CONFIG, images.get("mean"), images.get("std"))
        resize = {"resize": "squash"} if images.get("resize_mode") == "squash" else {}
        return resize | _open_clip_fields(_object(described, "model_cfg"), vocab_size)
    return {}


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    return _value(values, name, dict[str, Any], {})


def _value(values: dict[str, Any], name: str, hint: Any, default: Any) -> Any:
    """Return a value of open_clip's config, or its default; ValueError if it has another type."""
    value = values.get(name)
    if value is None:
        return default
    if mismatch_error(value, hint) is not None:
        raise ValueError(
            f"source: expected {describe_type(hint)} for {name} in {OPEN_CLIP_CONFIG}, got "
            f"{reprlib.repr(value)}"
        )
    return value


def _check_stats(file: str, mean: Any, std: Any) -> None:
    for name, got, ours in (("mean", mean, CLIP_MEAN), ("std", std, CLIP_STD)):
        if got is None:
            continue
        numbers = tuple(got) if isinstance(got, list) else got
        if mismatch_error(numbers, tuple[float, float, float]) or any(
            abs(a - b) > 1e-3 for a, b in zip(numbers, ours, strict=True)
        ):
            raise ValueError(
                f"source: expected the {name} {ours} of images in {file}, as in our models, got "
                f"{reprlib.repr(numbers)}; pass only the weight file to convert it all the same"
            )


def _hf_fields(family: str, config: Any) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    fields = {
        "vision_heads": vision.num_attention_heads,
        "text_heads": text.num_attention_heads,
        "vision_norm_eps": vision.layer_norm_eps,
        "text_norm_eps": text.layer_norm_eps,
    }
    ids = {"pad_token_id": text.pad_token_id}
    if family == "clip":
        if vision.hidden_act != text.hidden_act:
            raise ValueError(
                "source: expected one activation in both towers, got "
                f"{vision.hidden_act!r} and {text.hidden_act!r}"
            )
        fields["activation"] = vision.hidden_act
        if text.eos_token_id != 2:  # in transformers 2 means the highest id of each text
            ids["eos_token_id"] = text.eos_token_id
        return fields | _known_ids(ids, text.vocab_size)
    for activation in (vision.hidden_act, text.hidden_act):
        if activation != "gelu":
            raise ValueError(f"source: expected activation 'gelu', got {activation!r}")
    fields["text_dropout"] = text.hidden_dropout_prob
    ids |= {"sep_token_id": text.sep_token_id, "decoder_token_id": text.bos_token_id}
    if text.bos_token_id is not None:  # BLIP's tokenizers add [DEC], then [ENC]
        ids["encoder_token_id"] = text.bos_token_id + 1
    return fields | _known_ids(ids, text.vocab_size)


def _open_clip_fields(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    vision, text = _object(config, "vision_cfg"), _object(config, "text_cfg")
    pools = {"pool_type": "tok"}, {"pool_type": ("argmax", "eos")}
    for tower, pool in zip((vision, text), pools, strict=True):
        for name, expected in (OPEN_CLIP_FIXED | pool).items():
            allowed = expected if isinstance(expected, tuple) else (expected,)
            if tower.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"source: expected {name} = {' or '.join(map(repr, allowed))} in "
                    f"{OPEN_CLIP_CONFIG}, got {reprlib.repr(tower[name])}, which our CLIP does "
                    "not support"
                )
    fields = {
        "vision_heads": _value(vision, "width", Size, 768)
        // _value(vision, "head_width", Size, HEAD_WIDTH),
        "text_heads": _value(text, "heads", Size, 8),
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
    }
    for part, tower in (("vision", vision), ("text", text)):
        fields[f"{part}_norm_eps"] = _value(_object(tower, "norm_kwargs"), "eps", Positive, 1e-5)
    ids = {"pad_token_id": _value(text, "pad_id", int, 0)}
    if text.get("pool_type") == "eos":
        ids["eos_token_id"] = _value(text, "eos_id", int, 2)
    return fields | _known_ids(ids, vocab_size)


def _known_ids(ids: dict[str, int | None], vocab_size: int) -> dict[str, int]:
    """Drop ids outside the vocabulary: configs keep default ids beyond a small vocabulary."""
    return {name: i for name, i in ids.items() if i is not None and 0 <= i < vocab_size}


def _ratio(hidden: int, width: int) -> float:
    """Return hidden / width, rounded such that int(width * ratio) equals hidden."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
