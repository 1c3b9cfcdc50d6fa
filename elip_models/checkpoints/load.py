"""Other people's checkpoints as our models.

    official ALBEF, BLIP, METER   .pth or .ckpt; also ELIP's own, whose names are the same
    open_clip                     .pt, .safetensors, or a folder with open_clip_config.json
    transformers                  a folder of CLIPModel or of the Blip family
    ours                          a folder that save_pretrained wrote

Names and what fills missing parts: `names.py`; the config: `model_config.py`; the way back:
`export.py`. Files are read as tensors alone, never as code.
"""

import math
import os
import pickle
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
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
from elip_models.models.io.files import check_numbers, read_config, read_object, read_tensors
from elip_models.models.io.weights import first_names, load_weights
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
"""What torch.load raises for other content than tensors, and for a file that is none of its own."""


class Checkpoint(NamedTuple):
    """kind: of the table. weights: by our names where the table knows them. fields: of our config
    that the source says. ignored: names of tensors that the kind passes over.
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
    """Our model, in eval mode, with the weights of a checkpoint.

    Sizes follow from the weights. Heads are 64 wide, and ids and activation ours, unless the
    source has a config that says so or an override does.

    Args:
        source: a file or a folder, see above.
        kind: one of `KINDS`, or 'ours'; None recognises it by the names of the tensors.
        tokenizer: says the ids of special tokens; BLIP adds [DEC] and [ENC] to it.
        allow_missing: patterns of our names, `*` for any part, that may stay as initialised, beside
            those that the kind is known to lack.
        allow_unexpected: patterns of the checkpoint's names that are left aside.
        overrides: fields of the model's config; another `image_size` than the checkpoint's
            interpolates the position embeddings (bicubic).

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        ValueError: a file that holds more than tensors, an unknown kind, a setting or a tokenizer
            that our model cannot have, or tensors that are missing, unexpected or of another shape,
            all listed.
    """
    if kind is not None and kind not in (*KINDS, OURS):
        raise ValueError(f"kind: expected one of {', '.join((*KINDS, OURS))}, got {kind!r}")
    read = read_checkpoint(Path(source), kind)
    family = MODELS[read.kind.family]
    fields = read.fields | _ids(family, tokenizer, read.fields) | overrides
    model = family(family.config_class.from_dict(fields | default_heads(fields)))
    _load_(model, read, tuple(allow_missing), tuple(allow_unexpected))
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the weight file in a folder, without what they are wrapped in,
    and by the names that they have without DataParallel and torch.compile.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        ValueError: a file that holds more than tensors, or none.
    """
    weights = {
        name.replace("_orig_mod.", ""): weight for name, weight in _read_stored(path).items()
    }
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
                f"source: expected weights, or the index of their shards, got {path}; where it is "
                "a config, name its folder"
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
    _check_unpacked(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        others = _other_content(path)
        got = f"{others}, which could run code" if others else "a damaged file or other content"
        mend = "" if others else "copy or download it again, or "
        raise ValueError(
            f"source: expected tensors, numbers and texts alone in {path}, got {got}; {mend}where "
            "you trust it, save its state dict alone, torch.save({'model': state_dict}, ..)"
        ) from error
    return _unwrapped(content, path)


def _check_unpacked(path: Path) -> None:
    """It is no TorchScript, and nothing in it is compressed, as torch.save leaves it: a small file
    cannot fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            is_script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # of the older format, or damaged, which torch.load says
    if is_script:
        raise ValueError(
            f"source: expected tensors alone in {path}, got TorchScript, which is code, as "
            "OpenAI's CLIP files are; where you trust it, "
            "torch.save(torch.jit.load(..).state_dict(), ..)"
        )
    if unpacked > path.stat().st_size:
        raise ValueError(
            f"source: expected a file that torch.save wrote, which compresses nothing, got {path} "
            f"of {path.stat().st_size} bytes, which would unpack to {unpacked}"
        )


def _other_content(path: Path) -> str:
    """The classes and functions that a pickle names beside tensors, where it can be looked into."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*LOAD_ERRORS, ValueError):
        names = []
    return ", ".join(names)


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in {"state_dict": ..} or {"model": ..}, or itself."""
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
    """What a file or folder holds, of the kind `name`, or recognised; raises as
    `convert_checkpoint`.
    """
    weights = read_weights(path)
    folder = path if path.is_dir() else None
    family, config = None, {}
    if name in (None, OURS) and folder is not None and (folder / "config.json").is_file():
        family, config = read_config(folder, with_weights=False)
    if family in MODELS:
        if has_adapter(folder):
            raise ValueError(
                f"source: expected plain weights, got adapters beside them in {folder}; load it by "
                "load_model, merge_ it, and save it elsewhere"
            )
        return Checkpoint(Kind(family, {}, has=()), weights, config)
    if name == OURS:
        raise ValueError(f"kind: expected a folder that save_pretrained wrote, got {path}")
    kind = KINDS[name or _recognised(weights, folder)]
    kept = {
        tensor: weight
        for tensor, weight in weights.items()
        if not any(fnmatchcase(tensor, pattern) for pattern in kind.ignored)
    }
    check_numbers(path, kept)
    ours = rename_tensors(kept, kind.names)
    fields = sizes_from_weights(kind.family, ours)
    if "input_resolution" in weights:  # of OpenAI's own CLIP, and of no other
        fields["activation"] = "quick_gelu"
    fields |= fields_from_config(kind, folder, fields.get("vocab_size", 0))
    if kind.family == "blip":
        fields["tie_decoder"] = _decoder_is_tied(ours)
    if "logit_bias" in ours:
        fields["loss"] = "sigmoid"
    return Checkpoint(kind, ours, fields, tuple(weights.keys() - kept.keys()))


def _ids(
    family: type[PretrainedModel],
    tokenizer: "PreTrainedTokenizerBase | None",
    fields: dict[str, Any],
) -> dict[str, int]:
    """The ids of a tokenizer's special tokens."""
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


def _recognised(weights: dict[str, Tensor], folder: Path | None) -> str:
    """The kind; where the names do not say it, the error says what the folder is."""
    try:
        return recognise_kind(weights)
    except ValueError as error:
        named = [n for n in ("config.json", OPEN_CLIP_CONFIG) if folder and (folder / n).is_file()]
        described = read_object(folder / named[0]) if named else {}
        architectures = described.get("architectures")
        hint = f"; config.json says {', '.join(architectures)}" if architectures else ""
        raise ValueError(f"{error}{hint}") from error


def _decoder_is_tied(weights: dict[str, Tensor]) -> bool:
    """Whether all that a decoder shares with the encoder in pre-training is the same here."""
    for name, weight in weights.items():
        theirs = weights.get(name.replace("decoder.", "encoders.text.", 1))
        is_shared = name.startswith("decoder.") and ".attention." not in name
        if is_shared and theirs is not None and not torch.equal(weight, theirs):
            return False
    return True


def _load_(
    model: PretrainedModel,
    read: Checkpoint,
    allow_missing: tuple[str, ...],
    allow_unexpected: tuple[str, ...],
) -> None:
    """Load what was read, and fill the parts that the kind may lack and that are not there."""
    weights = fit_shapes(model, read.weights)
    check_tied_weights(model, weights)
    fills = {
        part: filling
        for part, filling in read.kind.fills.items()
        if not any(name.startswith(part) for name in weights)
    }
    missing = (*(f"{part}*" for part in fills), *allow_missing)
    load_weights(model, weights, allow_missing=missing, allow_unexpected=allow_unexpected)
    fill_absent_parts_(model, fills)


def fit_shapes(model: PretrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leading dims of size 1 added or dropped, position embeddings at the model's image size."""
    state = model.state_dict()
    fitted = {}
    for name, weight in weights.items():
        if name in state:
            weight = match_leading_dims(weight, state[name].shape)
            if name.endswith("visual.pos_embed") and weight.shape[1:2] != state[name].shape[1:2]:
                weight = resample_pos_embed(weight, model)
        fitted[name] = weight
    return fitted


def resample_pos_embed(pos_embed: Tensor, model: PretrainedModel) -> Tensor:
    """Position embeddings (1, 1 + G^2, D), CLS first, on the model's grid, bicubic; with
    antialiasing for CLIP, as open_clip does, and without for the others, as their code does.
    """
    if pos_embed.ndim != 3 or math.isqrt(pos_embed.shape[1] - 1) ** 2 != pos_embed.shape[1] - 1:
        return pos_embed  # of no square grid: its shape is said to be another
    side = model.config.image_size // model.config.patch_size
    return resample_abs_pos_embed(
        pos_embed, [side, side], num_prefix_tokens=1, antialias=model.family == "clip"
    )


def match_leading_dims(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight with as many leading dims as `shape`, where those that come or go have size 1."""
    missing = len(shape) - weight.ndim
    if missing > 0 and all(size == 1 for size in shape[:missing]):
        return weight.reshape(*shape[:missing], *weight.shape)
    if missing < 0 and all(size == 1 for size in weight.shape[:-missing]):
        return weight.reshape(weight.shape[-missing:])
    return weight


def check_tied_weights(model: PretrainedModel, weights: dict[str, Tensor]) -> None:
    """Raises ValueError where names of one tensor hold different values."""
    seen: dict[str, str] = {}
    differing = []
    for name, first in first_names(model).items():
        if name in weights:
            other = seen.setdefault(first, name)
            if not torch.equal(weights[other], weights[name]):
                differing.append(f"{name} and {other}")
    if differing:
        raise ValueError(
            "weights: expected the same values in tensors that the model shares, got others in "
            f"{', '.join(differing)}"
        )


@torch.no_grad()
def fill_absent_parts_(model: PretrainedModel, fills: dict[str, str | None]) -> None:
    """Copy what a kind of checkpoint lacks, in order, but for tensors shared with other parts."""
    state, first = model.state_dict(), first_names(model)
    for part, source in fills.items():
        if source is None:
            continue
        for name in state:
            if name.startswith(part) and first[name] == name:
                state[name].copy_(state[source + name.removeprefix(part)])
