"""Conversion of checkpoints to our models.

    official ALBEF, BLIP, METER   .pth or .ckpt; ELIP's own have the same names
    open_clip                     .pt, .safetensors, or a folder with open_clip_config.json
    transformers                  a folder of CLIPModel or of the Blip family
    ours                          a folder that save_pretrained wrote

`weight_files.py` reads the files, `names.py` has the names of tensors, `model_config.py` derives
the config, and `export.py` converts in the other direction.
"""

import math
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from elip_models.integrations.peft.saved_adapter import has_adapter
from elip_models.pretraining.checkpoints.model_config import (
    OPEN_CLIP_CONFIG,
    default_heads,
    fields_from_config,
    sizes_from_weights,
)
from elip_models.pretraining.checkpoints.names import KINDS, Kind, recognise_kind
from elip_models.pretraining.checkpoints.renaming import rename_tensors
from elip_models.pretraining.checkpoints.weight_files import read_weights
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.registry import MODELS
from elip_models.saving.files import FLOATS, check_finite, read_config, read_object
from elip_models.saving.meta_build import meta_device, with_memory
from elip_models.saving.weights import check_weights, first_names, load_weights, matches_any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OURS = "ours"


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        weights: tensors under our names; names that the table does not have are unchanged.
        fields: fields of our config that follow from the checkpoint.
        ignored: names of tensors that the kind ignores.
    """

    kind: Kind
    weights: dict[str, Tensor]
    fields: dict[str, Any]
    ignored: tuple[str, ...] = ()


def convert_checkpoint(
    source: str | os.PathLike,
    *,
    kind: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    **overrides: Any,
) -> PretrainedModel:
    """Return our model with the weights of a checkpoint, in eval mode.

    Sizes follow from the shapes of the weights. Heads are 64 wide, and token ids and activation
    have our defaults, unless a config in the source or `overrides` has other values.

    Example::

        model = convert_checkpoint("ALBEF.pth", schedule="albef")

    Args:
        source: a file or a folder, as in the table at the top of this module.
        kind: a key of `KINDS`, or 'ours'. None: the kind follows from the names of the tensors.
        tokenizer: sets the ids of special tokens. BLIP adds [DEC] and [ENC] to it.
        allow_missing: patterns of our names, `*` for any part, that may keep their initial values,
            beside the parts that the kind is known to lack.
        allow_unexpected: patterns of names in the checkpoint that are ignored.
        overrides: fields of the model's config. Another `image_size` than the checkpoint's
            interpolates the position embeddings (bicubic).

    Raises:
        FileNotFoundError: the file is missing, or the folder has no weights.
        ValueError: the file has other content than tensors; the kind is unknown; our model does not
            support a setting or the tokenizer; or tensors are missing, unexpected or of another
            shape, all listed.
    """
    if kind is not None and kind not in (*KINDS, OURS):
        raise ValueError(f"kind: expected one of {', '.join((*KINDS, OURS))}, got {kind!r}")
    read = read_checkpoint(Path(source), kind)
    family = MODELS[read.kind.family]
    fields = read.fields | _token_ids(family, tokenizer, read.fields) | overrides
    config = family.config_class.from_dict(fields | default_heads(fields))
    missing, unexpected = tuple(allow_missing), tuple(allow_unexpected)
    with meta_device(len(read.weights)):  # weights that do not fit take no memory
        outline = family(config)
    weights = fit_weights(outline, read.weights)
    missing += tuple(f"{part}*" for part in _absent_parts(outline, weights, read.kind.fills))
    check_weights(outline, weights, allow_missing=missing, allow_unexpected=unexpected)
    model = with_memory(outline, lambda: family(config), weights)
    load_and_fill_(model, weights, read.kind.fills, missing, unexpected)
    return model.eval()


def read_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Read a file or folder of the kind `name`, or of the kind that its tensor names match."""
    weights = read_weights(path)
    folder = path if path.is_dir() else None
    family, config = None, {}
    if name in (None, OURS) and folder is not None and (folder / "config.json").is_file():
        family, config = read_config(folder, with_weights=False)
    if family in MODELS:
        check_finite(path, weights)
        if has_adapter(folder):
            raise ValueError(
                f"source: expected plain weights, got adapters beside them in {folder}; load it by "
                "load_model, merge_ it, and save it to another folder"
            )
        return Checkpoint(Kind(family, {}, has=()), weights, config)
    if name == OURS:
        raise ValueError(f"kind: expected a folder that save_pretrained wrote, got {path}")
    kind = KINDS[name or _find_kind(weights, folder)]
    kept = {tensor: w for tensor, w in weights.items() if not matches_any(tensor, kind.ignored)}
    check_finite(path, kept)
    ours = rename_tensors(kept, kind.names)
    fields = sizes_from_weights(kind.family, ours)
    if "input_resolution" in weights:  # only in OpenAI's CLIP
        fields["activation"] = "quick_gelu"
    fields |= fields_from_config(kind, folder, fields.get("vocab_size", 0))
    if kind.family == "blip":
        fields["tie_decoder"] = _decoder_is_tied(ours)
    if "logit_bias" in ours:
        fields["loss"] = "sigmoid"
    return Checkpoint(kind, ours, fields, tuple(weights.keys() - kept.keys()))


def _token_ids(
    family: type[PretrainedModel],
    tokenizer: "PreTrainedTokenizerBase | None",
    fields: dict[str, Any],
) -> dict[str, int]:
    if tokenizer is None:
        return {}
    config = family.config_class()
    context_length = fields.get("context_length", config.context_length)
    found = family.fit_tokenizer(tokenizer, context_length)
    tokens, rows = found.pop("vocab_size"), fields.get("vocab_size", config.vocab_size)
    if tokens > rows:
        raise ValueError(
            f"tokenizer: expected at most {rows} tokens, the rows of the checkpoint's embeddings, "
            f"got {tokens}"
        )
    return found


def _find_kind(weights: dict[str, Tensor], folder: Path | None) -> str:
    try:
        return recognise_kind(weights)
    except ValueError as error:
        named = [n for n in ("config.json", OPEN_CLIP_CONFIG) if folder and (folder / n).is_file()]
        described = read_object(folder / named[0]) if named else {}
        architectures = described.get("architectures")
        hint = f"; config.json has {reprlib.repr(architectures)}" if architectures else ""
        raise ValueError(f"{error}{hint}") from error


def _decoder_is_tied(weights: dict[str, Tensor]) -> bool:
    """Return whether the decoder has the encoder's values in all parts that pre-training shares."""
    for name, weight in weights.items():
        theirs = weights.get(name.replace("decoder.", "encoders.text.", 1))
        is_shared = name.startswith("decoder.") and ".attention." not in name
        if is_shared and theirs is not None and not _is_equal(weight, theirs):
            return False
    return True


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def fit_weights(model: PretrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add or drop leading dims of size 1, and resample position embeddings to the image size.

    ValueError is raised if several names of one tensor have different values.
    """
    state = model.state_dict()
    fitted = {}
    for name, weight in weights.items():
        if name in state:
            weight = match_leading_dims(weight, state[name].shape)
            if name.endswith("visual.pos_embed") and weight.shape[1:2] != state[name].shape[1:2]:
                weight = resample_pos_embed(weight, model)
        fitted[name] = weight
    seen: dict[str, str] = {}
    differing = []
    for name, first in first_names(model).items():
        if name in fitted:
            other = seen.setdefault(first, name)
            if not _is_equal(fitted[other], fitted[name]):
                differing.append(f"{name} and {other}")
    if differing:
        raise ValueError(
            "weights: expected the same values in tensors that the model shares, got different "
            f"values in {', '.join(differing)}"
        )
    return fitted


def resample_pos_embed(pos_embed: Tensor, model: PretrainedModel) -> Tensor:
    """Interpolate position embeddings (1, 1 + G^2, D), CLS first, to the model's grid, bicubic."""
    positions = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    if positions < 1 or math.isqrt(positions) ** 2 != positions or pos_embed.dtype not in FLOATS:
        return pos_embed  # not a square grid: loading raises an error for its shape or dtype
    side = model.config.image_size // model.config.patch_size
    antialias = model.family == "clip"  # only, as in open_clip and the official code
    return resample_abs_pos_embed(pos_embed, [side, side], num_prefix_tokens=1, antialias=antialias)


def match_leading_dims(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return the weight with as many dims as `shape`, if the leading ones to change have size 1."""
    missing = len(shape) - weight.ndim
    if missing > 0 and all(size == 1 for size in shape[:missing]):
        return weight.reshape(*shape[:missing], *weight.shape)
    if missing < 0 and all(size == 1 for size in weight.shape[:-missing]):
        return weight.reshape(weight.shape[-missing:])
    return weight


def _absent_parts(
    model: PretrainedModel, weights: dict[str, Tensor], fills: dict[str, str | None]
) -> dict[str, str | None]:
    """Return the entries of `fills` for parts of the model of which there are no weights."""
    state = model.state_dict()
    return {
        part: source
        for part, source in fills.items()
        if any(name.startswith(part) for name in state)
        and not any(name.startswith(part) for name in weights)
    }


@torch.no_grad()
def load_and_fill_(
    model: PretrainedModel,
    weights: dict[str, Tensor],
    fills: dict[str, str | None],
    allow_missing: tuple[str, ...],
    allow_unexpected: tuple[str, ...] = (),
) -> dict[str, str | None]:
    """Load weights, and copy the parts of the model of which they have nothing.

    The result is the entries of `fills` for such parts. They are copied in order, except tensors
    shared with other parts.
    """
    state, first = model.state_dict(), first_names(model)
    absent = _absent_parts(model, weights, fills)
    missing = (*(f"{part}*" for part in absent), *allow_missing)
    load_weights(model, weights, allow_missing=missing, allow_unexpected=allow_unexpected)
    for part, source in absent.items():
        for name in state:
            if source is not None and name.startswith(part) and first[name] == name:
                state[name].copy_(state[source + name.removeprefix(part)])
    return absent
