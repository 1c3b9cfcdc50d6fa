"""Warm start: initialise a new model from a checkpoint, and list where each tensor comes from.

    loaded        tensors of the checkpoint, unchanged
    interpolated  position embeddings, bicubic, at the model's image size
    copied        parts that are copies of other parts, such as momentum encoders
    new           tensors that keep their initial values
    left out      tensors of the checkpoint that are not used

Momentum encoders start as copies and a queue starts random, even if the checkpoint has them: a warm
start does not resume training. A downstream model instead uses `from_pretraining`, with momentum
encoders and queue if the original implementation does. Sizes, schedule and tokens are the model's
own. Heads, activation and epsilons, which no tensor determines, must match the checkpoint's config.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from elip_models.pretraining.checkpoints.load import (
    Checkpoint,
    fit_weights,
    load_and_fill_,
    read_checkpoint,
)
from elip_models.pretraining.checkpoints.names import INFERENCE
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.saving.weights import first_names, load_weights, matches_any

WITHOUT_TENSOR = ("_heads", "_norm_eps", "activation")
"""Suffixes of fields that change the output, but not the shape of any weight."""


@dataclass(frozen=True)
class WarmStart:
    """Sources of a model's tensors, by our names, as listed at the top of this module.

    Attributes:
        source: path of the checkpoint.
        interpolated: name -> shape in the checkpoint and in the model.
        copied: prefix of a part -> prefix of the part that it is a copy of.
    """

    source: str
    loaded: tuple[str, ...]
    interpolated: dict[str, str]
    copied: dict[str, str]
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def summary(self) -> str:
        """Return the list as text, with counts of tensors by the first two parts of their names."""
        rows = {
            "loaded": _counted(self.loaded),
            "interpolated": ", ".join(f"{name} {how}" for name, how in self.interpolated.items()),
            "copied": ", ".join(f"{part}* from {other}*" for part, other in self.copied.items()),
            "new": _counted(self.new),
            "left out": _counted(self.left_out),
        }
        return "\n".join(
            [f"pretrained: {self.source}"]
            + [f"  {what:<13} {listed or 'nothing'}" for what, listed in rows.items()]
        )


def warm_start_(
    model: PretrainedModel,
    source: str | os.PathLike,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> WarmStart:
    """Initialise a model in place from a checkpoint of its family.

    Args:
        model: a new model.
        source: a file or a folder, as of `convert_checkpoint`. A downstream model can also start
            from a checkpoint of its pre-trained family.
        allow_missing: patterns of our names, `*` for any part, that may keep their initial values.
        allow_unexpected: patterns of names in the checkpoint, after renaming, that are left out.

    Returns:
        The source of each tensor.

    Raises:
        FileNotFoundError: the file is missing, or the folder has no weights.
        ValueError: the checkpoint does not fit the model, or a pattern matches no tensor. The model
            is unchanged then.
    """
    read, state = read_checkpoint(Path(source)), model.state_dict()
    missing, left_out = tuple(allow_missing), tuple(allow_unexpected)
    if model.task is not None and read.kind.family == model.pretraining.family:
        return _warm_start_downstream_(model, source, read, missing, left_out)
    _check_config(model, read.kind.family, read.fields)
    _check_patterns("allow_missing", missing, state)
    _check_patterns("allow_unexpected", left_out, read.weights)
    left_out += tuple(f"{part}*" for part in INFERENCE)
    kept = {n: weight for n, weight in read.weights.items() if not matches_any(n, left_out)}
    weights = fit_weights(model, kept)
    try:
        fills = load_and_fill_(model, weights, read.kind.fills | INFERENCE, missing)
    except ValueError as error:
        raise ValueError(
            f"{error}; name in allow_missing what may be new, in allow_unexpected what to leave out"
        ) from error
    model.reset_momentum_()
    first, copied = first_names(model), {p: other for p, other in fills.items() if other}
    known = {first[name] for name in weights}
    new = [name for name in state if first[name] not in known]
    return WarmStart(
        source=str(source),
        loaded=tuple(name for name in state if name in weights),
        interpolated={
            name: f"{tuple(kept[name].shape)} -> {tuple(weight.shape)}"
            for name, weight in weights.items()
            if kept[name].numel() != weight.numel()
        },
        copied=copied,
        new=tuple(name for name in new if not name.startswith(tuple(copied))),
        left_out=(*(name for name in read.weights if name not in kept), *sorted(read.ignored)),
    )


def _warm_start_downstream_(
    model: PretrainedModel,
    source: str | os.PathLike,
    read: Checkpoint,
    missing: Sequence[str],
    left_out: Sequence[str],
) -> WarmStart:
    """Load the checkpoint, momentum and queue included, and map it by `from_pretraining`."""
    config = model.pretraining.config_class
    known = {field.name for field in fields(config)}
    shared = {name: value for name, value in vars(model.config).items() if name in known}
    pretrained = model.pretraining(config.from_dict(shared))
    start = warm_start_(pretrained, source, allow_missing=missing, allow_unexpected=left_out)
    weights = pretrained.state_dict()
    for name in weights:
        own = read.weights.get(name)
        if name.startswith(tuple(INFERENCE)) and own is not None:
            weights[name] = own if own.shape == weights[name].shape else weights[name]
    state, given = model.state_dict(), model.from_pretraining(weights, model.config)
    loaded = {name: weight for name, weight in given.items() if name in state}
    load_weights(model, loaded, allow_missing=[name for name in state if name not in loaded])
    first = first_names(model)
    tied = {first[name] for name in loaded}
    return replace(
        start,
        loaded=tuple(loaded),
        copied={},
        new=tuple(name for name in state if first[name] not in tied),
        left_out=(*start.left_out, *(name for name in given if name not in state)),
    )


def _check_config(model: PretrainedModel, family: str, theirs: dict[str, Any]) -> None:
    if family != model.family:
        raise ValueError(f"expected a checkpoint of {model.family!r}, got one of {family!r}")
    for name, ours in vars(model.config).items():
        if name.endswith(WITHOUT_TENSOR) and theirs.get(name, ours) != ours:
            raise ValueError(
                f"{name}: expected {ours!r}, as in the model, in the config of the checkpoint, got "
                f"{theirs[name]!r}; set {name} of the model to this value"
            )


def _check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    unmatched = [each for each in patterns if not any(matches_any(name, [each]) for name in names)]
    if unmatched:
        raise ValueError(f"{argument}: expected patterns that match a tensor, got {unmatched}")


def _counted(names: Iterable[str]) -> str:
    """Return a text such as "visual.blocks 48, visual.pos_embed"."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(part if count == 1 else f"{part} {count}" for part, count in counts.items())
