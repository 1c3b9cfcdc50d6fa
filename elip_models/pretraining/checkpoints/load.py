"""Loading of checkpoints into our models, and conversion to them.

    official ALBEF, BLIP, METER   .pth or .ckpt; ELIP's own have the same names
    open_clip                     .pt, .safetensors, or a folder with open_clip_config.json
    transformers                  a folder of CLIPModel
    ours                          a folder that save_pretrained wrote

`weight_files.py` reads the files, `names.py` has the names of tensors, `model_config.py` derives
the config, and `export.py` converts in the other direction.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from elip_models.integrations.peft.saved_adapter import has_adapter
from elip_models.pretraining.checkpoints.model_config import (
    default_heads,
    fields_from_config,
    sizes_from_weights,
)
from elip_models.pretraining.checkpoints.names import (
    FILLS,
    KINDS,
    MOMENTUM,
    NOT_LOADED,
    recognise_kind,
)
from elip_models.pretraining.checkpoints.renaming import rename_tensors
from elip_models.pretraining.checkpoints.weight_files import read_weights
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.registry import MODELS
from elip_models.saving.files import check_finite, read_config
from elip_models.saving.weights import first_names, load_weights, matches_any
from elip_models.validation import as_config_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        source: its path.
        family: family of our model.
        weights: tensors under our names; names that the table does not have are unchanged.
        fields: fields of our config that follow from the checkpoint.
        ignored: names of tensors that are not read.
    """

    source: Path
    family: str
    weights: dict[str, Tensor]
    fields: dict[str, Any]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadReport:
    """Sources of a model's tensors, by our names.

    Attributes:
        source: path of the checkpoint.
        loaded: tensors of the checkpoint.
        interpolated: position embeddings -> shape in the checkpoint and in the model.
        copied: prefix of a part -> prefix of the part that it is a copy of, as momentum encoders.
        new: tensors that keep their initial values.
        left_out: tensors of the checkpoint that are not used.
    """

    source: str
    loaded: tuple[str, ...]
    interpolated: dict[str, str]
    copied: dict[str, str]
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def summary(self) -> str:
        """Return the report as text; tensors are counted by the first two parts of their names."""
        rows = {
            "loaded": _counted(self.loaded),
            "interpolated": ", ".join(f"{name} {how}" for name, how in self.interpolated.items()),
            "copied": ", ".join(f"{part}* from {other}*" for part, other in self.copied.items()),
            "new": _counted(self.new),
            "left out": _counted(self.left_out),
        }
        return "\n".join(
            [f"pretrained: {self.source}"]
            + [f"  {what:<13} {tensors or 'nothing'}" for what, tensors in rows.items()]
        )


def convert_checkpoint(
    source: str | os.PathLike,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    report: Callable[[LoadReport], Any] | None = None,
    **overrides: Any,
) -> PretrainedModel:
    """Return our model with the weights of a checkpoint, in eval mode.

    Sizes follow from the shapes of the weights. Heads are 64 wide, and token ids and activation
    have our defaults, unless a config in the source or `overrides` has other values. Parts that
    checkpoints for inference or of a task lack, see `FILLS`, are copies of others or new.

    Example::

        model = convert_checkpoint("ALBEF.pth", schedule="albef")

    Args:
        source: a file or a folder, as in the table at the top of this module.
        tokenizer: sets the ids of special tokens. BLIP adds [DEC] and [ENC] to it.
        allow_missing: patterns of our names, `*` for any part, that may keep their initial values.
        allow_unexpected: patterns of names, after renaming, that are left out.
        report: called with the source of each tensor.
        overrides: fields of the model's config. Another `image_size` than the checkpoint's
            interpolates the position embeddings (bicubic).

    Raises:
        FileNotFoundError: the file is missing, or the folder has no weights.
        ValueError: the file has other content than tensors; the kind is unknown; our model does not
            support a setting or the tokenizer; or tensors are missing, unexpected or of another
            shape, all listed.
    """
    checkpoint = read_checkpoint(Path(source))
    family, fields = MODELS[checkpoint.family], checkpoint.fields
    if tokenizer is not None:
        default = family.config_class()
        length = fields.get("context_length", default.context_length)
        ids = family.fit_tokenizer(tokenizer, length)
        tokens, rows = ids.pop("vocab_size"), fields.get("vocab_size", default.vocab_size)
        if tokens > rows:
            raise ValueError(
                f"tokenizer: expected at most {rows} tokens, the rows of the checkpoint's "
                f"embeddings, got {tokens}"
            )
        fields = fields | ids
    fields = fields | overrides
    with as_config_error(f"source: {source}"):
        config = family.config_class.from_dict(fields | default_heads(fields))
    model = family(config)
    loaded = load_checkpoint_(
        model, checkpoint, allow_missing=allow_missing, allow_unexpected=allow_unexpected
    )
    if report is not None:
        report(loaded)
    return model.eval()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file or folder of one of `KINDS`, or a folder that `save_pretrained` wrote."""
    weights = read_weights(path)
    if (path / "config.json").is_file():
        family, config = read_config(path, with_weights=False)
        if family in MODELS:
            check_finite(path, weights)
            if has_adapter(path):
                raise ValueError(
                    f"source: expected plain weights, got adapters beside them in {path}; load it "
                    "by load_model, merge_ it, and save it to another folder"
                )
            return Checkpoint(path, family, weights, config)
    kind = recognise_kind(weights)
    family, names, _ = KINDS[kind]
    ignored = tuple(name for name in weights if matches_any(name, NOT_LOADED))
    kept = {name: weight for name, weight in weights.items() if name not in ignored}
    check_finite(path, kept)
    ours = rename_tensors(kept, names)
    fields = sizes_from_weights(family, ours)
    if "input_resolution" in ignored:  # only in OpenAI's CLIP
        fields["activation"] = "quick_gelu"
    fields |= fields_from_config(kind, path, fields.get("vocab_size", 0))
    if family == "blip":
        fields["tie_decoder"] = _decoder_is_tied(ours)
    if "logit_bias" in ours:
        fields["loss"] = "sigmoid"
    return Checkpoint(path, family, ours, fields, ignored)


@torch.no_grad()
def load_checkpoint_(
    model: PretrainedModel,
    checkpoint: Checkpoint,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    momentum: bool = True,
) -> LoadReport:
    """Load a checkpoint in place; parts of the model that it lacks are filled as in `FILLS`.

    ValueError lists what is missing, unexpected or of another shape; the model is unchanged then.
    Without `momentum`, momentum encoders and queue are not read.
    """
    state, first = model.state_dict(), first_names(model)
    missing, unexpected = tuple(allow_missing), tuple(allow_unexpected)
    dropped = unexpected if momentum else (*unexpected, "encoders_m.*", "queue.*")
    kept = {n: w for n, w in checkpoint.weights.items() if not matches_any(n, dropped)}
    weights = fit_weights(model, kept)
    fills: dict[str, str | None] = {}
    parts = FILLS.get(model.family, {}) | ({} if momentum else MOMENTUM)
    for part, other in parts.items():
        is_absent = _has(part, state) and not _has(part, weights)
        if is_absent and not part.startswith(tuple(fills)):
            fills[part] = other
    try:
        load_weights(model, weights, allow_missing=(*missing, *(f"{part}*" for part in fills)))
    except ValueError as error:
        raise ValueError(
            f"{error}; name in allow_missing what may be new, in allow_unexpected what to leave out"
        ) from error
    copied = {part: other for part, other in fills.items() if other}
    for part, other in copied.items():
        for name in state:
            if name.startswith(part) and first[name] == name:
                state[name].copy_(state[other + name.removeprefix(part)])
    known = {first[name] for name in weights}
    new = [name for name in state if first[name] not in known]
    return LoadReport(
        source=str(checkpoint.source),
        loaded=tuple(name for name in state if name in weights),
        interpolated={
            name: f"{tuple(kept[name].shape)} -> {tuple(weight.shape)}"
            for name, weight in weights.items()
            if kept[name].numel() != weight.numel()
        },
        copied=copied,
        new=tuple(name for name in new if not name.startswith(tuple(copied))),
        left_out=(*(n for n in checkpoint.weights if n not in kept), *sorted(checkpoint.ignored)),
    )


def fit_weights(model: PretrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add or drop leading dims of size 1, and resample position embeddings to the image size.

    ValueError is raised if several names of one tensor have different values.
    """
    state, first = model.state_dict(), first_names(model)
    fitted, tied = {}, {}
    for name, weight in weights.items():
        if name in state:
            if name.endswith("visual.pos_embed"):
                weight = resample_pos_embed(weight, model)
            weight = match_leading_dims(weight, state[name].shape)
            other = tied.setdefault(first[name], weight)
            if not torch.equal(other, weight):
                raise ValueError(
                    "weights: expected the same values in tensors that the model shares, got "
                    f"different values in {name} and another name of {first[name]}"
                )
        fitted[name] = weight
    return fitted


def resample_pos_embed(pos_embed: Tensor, model: PretrainedModel) -> Tensor:
    """Interpolate position embeddings (1, 1 + G^2, D), CLS first, to the model's grid, bicubic."""
    if pos_embed.ndim == 2:
        pos_embed = pos_embed[None]
    positions = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    if positions < 1 or math.isqrt(positions) ** 2 != positions:
        return pos_embed  # not a square grid: loading raises an error for its shape
    side = model.config.image_size // model.config.patch_size
    antialias = model.family == "clip"  # only, as in open_clip and the official code
    return resample_abs_pos_embed(pos_embed, [side, side], num_prefix_tokens=1, antialias=antialias)


def match_leading_dims(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return the weight with as many leading dims of size 1 as `shape`, if the others are equal."""
    own, other = (list(dropwhile(lambda n: n == 1, sizes)) for sizes in (weight.shape, shape))
    return weight.reshape(shape) if own == other else weight


def _has(part: str, names: Iterable[str]) -> bool:
    return any(name.startswith(part) for name in names)


def _decoder_is_tied(weights: dict[str, Tensor]) -> bool:
    """Return whether the decoder has the encoder's values in all parts that pre-training shares."""
    for name, weight in weights.items():
        other = weights.get(name.replace("decoder.", "encoders.text.", 1))
        is_shared = name.startswith("decoder.") and ".attention." not in name
        if is_shared and other is not None and not torch.equal(weight, other):
            return False
    return True


def _counted(names: Iterable[str]) -> str:
    """Return a text such as "visual.blocks 48, visual.pos_embed"."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(part if count == 1 else f"{part} {count}" for part, count in counts.items())
