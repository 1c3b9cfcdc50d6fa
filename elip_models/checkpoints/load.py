"""Conversion of checkpoints to our models.

    official ALBEF, BLIP, METER   .pth or .ckpt; ELIP's own have the same names
    open_clip                     .pt, .safetensors, or a folder with open_clip_config.json
    transformers                  a folder of CLIPModel or of the Blip family
    ours                          a folder that save_pretrained wrote

`names.py` has the names of tensors, `model_config.py` derives the config, and `export.py` converts
in the other direction. Only tensors are read from files; no code in them is run.
"""

import math
import os
import pickle
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from elip_models.checkpoints.model_config import (
    OPEN_CLIP_CONFIG,
    default_heads,
    fields_from_config,
    sizes_from_weights,
)
from elip_models.checkpoints.names import KINDS, Kind, recognise_kind
from elip_models.checkpoints.renaming import rename_tensors
from elip_models.models.base import PretrainedModel
from elip_models.models.io.files import check_no_nan, read_config, read_object, read_tensors
from elip_models.models.io.weights import first_names, load_weights, matches_any
from elip_models.models.peft.saved_adapter import has_adapter
from elip_models.models.registry import MODELS
from elip_models.validation import mismatch_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OURS = "ours"
LOAD_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, UnicodeDecodeError, LookupError)
"""Errors of torch.load for content other than tensors, and for files of another format."""


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
    model = family(family.config_class.from_dict(fields | default_heads(fields)))
    weights, missing = fit_weights(model, read.weights), tuple(allow_missing)
    load_and_fill_(model, weights, read.kind.fills, missing, tuple(allow_unexpected))
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file or folder, without DataParallel's and compile's prefixes."""
    weights = {name.replace("_orig_mod.", ""): w for name, w in _read_stored(path).items()}
    while weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    return weights


def _read_stored(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"source: expected one of {', '.join(WEIGHT_FILES)} in a folder, got none in {path}"
            )
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"source: expected a file or a folder, got none at {path}")
    if path.suffix == ".json":
        shards = read_object(path).get("weight_map")
        if mismatch_error(shards, dict[str, str]):
            raise ValueError(
                f"source: expected weights, or the index of their shards, got {path}; pass the "
                "folder of a config"
            )
        files = [path.parent / shard for shard in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"source: expected {file}, which {path} names, got no file")
        pieces = [_read_file(file) for file in files]
        return {name: weight for piece in pieces for name, weight in piece.items()}
    return _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path)
        except ValueError as error:
            raise ValueError(f"source: {error}") from error
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        others = ""
        with suppress(*LOAD_ERRORS, ValueError):  # a damaged file
            others = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        got = f"{others}, which could run code" if others else "a damaged file or other content"
        remedy = "" if others else "copy or download it again, or "
        raise ValueError(
            f"source: expected only tensors, numbers and texts in {path}, got {got}; {remedy}if "
            "you trust it, save only its state dict, torch.save({'model': state_dict}, ..)"
        ) from error
    return _state_dict_in(content, path)


def _check_archive(path: Path) -> None:
    """Raise ValueError for TorchScript, and for compressed content, which could fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            is_script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # the older format, or a damaged file, for which torch.load raises an error
    if is_script:
        raise ValueError(
            f"source: expected only tensors in {path}, got TorchScript, which is code, as in "
            "OpenAI's CLIP files; if you trust it, torch.save(torch.jit.load(..).state_dict(), ..)"
        )
    if unpacked > path.stat().st_size:
        raise ValueError(
            f"source: expected an uncompressed file, as torch.save writes it, got {path} of "
            f"{path.stat().st_size} bytes, which would unpack to {unpacked}; save it again"
        )


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        wrapped = (content.get(name) for name in ("state_dict", "model"))
        content = next((inner for inner in wrapped if isinstance(inner, dict)), content)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"source: expected a dict of tensors, got {type(content).__name__} {path}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            "source: expected a state dict, bare or under 'state_dict' or 'model', got other "
            f"values in {path}: {', '.join(others[:10])}"
        )
    return content


def read_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Read a file or folder of the kind `name`, or of the kind that its tensor names match."""
    weights = read_weights(path)
    folder = path if path.is_dir() else None
    family, config = None, {}
    if name in (None, OURS) and folder is not None and (folder / "config.json").is_file():
        family, config = read_config(folder, with_weights=False)
    if family in MODELS:
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
    check_no_nan(path, kept)
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
        hint = f"; config.json has {', '.join(architectures)}" if architectures else ""
        raise ValueError(f"{error}{hint}") from error


def _decoder_is_tied(weights: dict[str, Tensor]) -> bool:
    """Return whether the decoder has the encoder's values in all parts that pre-training shares."""
    for name, weight in weights.items():
        theirs = weights.get(name.replace("decoder.", "encoders.text.", 1))
        is_shared = name.startswith("decoder.") and ".attention." not in name
        if is_shared and theirs is not None and not torch.equal(weight, theirs):
            return False
    return True


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
            if not torch.equal(fitted[other], fitted[name]):
                differing.append(f"{name} and {other}")
    if differing:
        raise ValueError(
            "weights: expected the same values in tensors that the model shares, got different "
            f"values in {', '.join(differing)}"
        )
    return fitted


def resample_pos_embed(pos_embed: Tensor, model: PretrainedModel) -> Tensor:
    """Interpolate position embeddings (1, 1 + G^2, D), CLS first, to the model's grid, bicubic."""
    if pos_embed.ndim != 3 or math.isqrt(pos_embed.shape[1] - 1) ** 2 != pos_embed.shape[1] - 1:
        return pos_embed  # not a square grid: loading raises an error for its shape
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
    absent = {
        part: source
        for part, source in fills.items()
        if any(name.startswith(part) for name in state)
        and not any(name.startswith(part) for name in weights)
    }
    missing = (*(f"{part}*" for part in absent), *allow_missing)
    load_weights(model, weights, allow_missing=missing, allow_unexpected=allow_unexpected)
    for part, source in absent.items():
        for name in state:
            if source is not None and name.startswith(part) and first[name] == name:
                state[name].copy_(state[source + name.removeprefix(part)])
    return absent
