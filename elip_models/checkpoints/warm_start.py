"""A fresh model that begins as a checkpoint, and the list of what came from there.

    loaded        tensors under our names, as they are
    interpolated  position embeddings, bicubic, to the model's image size
    copied        parts that begin as another, such as the momentum encoders
    new           what stays as initialised
    left out      tensors of the checkpoint that are not used

This is where training starts, not where it goes on: momentum encoders begin as copies and a queue
at random, whatever the checkpoint has. The model of a downstream task begins as its
`from_pretraining` says, with what a pre-trained one has, momentum encoders and queue where the
original takes them. Sizes, schedule and tokens are the model's own; heads, activation and epsilons,
which no tensor shows, have to be those that the checkpoint's config says.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elip_models.checkpoints.load import (
    Checkpoint,
    check_tied_weights,
    fill_absent_parts_,
    fit_shapes,
    read_checkpoint,
)
from elip_models.checkpoints.names import INFERENCE
from elip_models.models.base import PretrainedModel
from elip_models.models.io.weights import first_names, load_weights

WITHOUT_TENSOR = ("_heads", "_norm_eps", "activation")
"""How the names of fields end that change what weights compute, but not their shapes."""


@dataclass(frozen=True)
class WarmStart:
    """What a model began with.

    source: the checkpoint. loaded, new: our names. interpolated: our name -> both shapes. copied:
    how our names begin -> how those begin that they are copies of. left_out: names in the
    checkpoint, ours where there is one.
    """

    source: str
    loaded: tuple[str, ...]
    interpolated: dict[str, str]
    copied: dict[str, str]
    new: tuple[str, ...]
    left_out: tuple[str, ...]

    def summary(self) -> str:
        """The list, a line each, tensors counted by the first two parts of their names."""
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
    """Overwrite a fresh model by a checkpoint of its family, in place; that of a downstream task
    also by one of the family that it was pre-trained as.

    Args:
        source: a file or a folder, as `convert_checkpoint` takes it.
        allow_missing: patterns of our names, `*` for any part, that may stay as initialised.
        allow_unexpected: patterns of names in the checkpoint, ours where there is one, that are
            left out, also where the model has them.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        ValueError: a checkpoint of another family or config, a pattern that fits nothing, or
            tensors that are missing, unexpected or of another shape, all listed; the model is
            unchanged then.
    """
    read, state = read_checkpoint(Path(source)), model.state_dict()
    missing, left_out = tuple(allow_missing), tuple(allow_unexpected)
    if model.task is not None and read.kind.family == model.pretraining.family:
        return _begin_(model, source, read, missing, left_out)
    _check_alike(model, read.kind.family, read.fields)
    _check_patterns("allow_missing", missing, state)
    _check_patterns("allow_unexpected", left_out, read.weights)
    kept = {
        name: weight
        for name, weight in read.weights.items()
        if not name.startswith(tuple(INFERENCE)) and not _fits(name, left_out)
    }
    weights = fit_shapes(model, kept)
    check_tied_weights(model, weights)
    fills = _absent(read.kind.fills | INFERENCE, weights, state)
    try:
        load_weights(model, weights, allow_missing=(*(f"{part}*" for part in fills), *missing))
    except ValueError as error:
        raise ValueError(
            f"{error}; name in allow_missing what may be new, in allow_unexpected what is left out"
        ) from error
    fill_absent_parts_(model, fills)
    model.reset_momentum_()
    first, copied = first_names(model), {p: other for p, other in fills.items() if other}
    begun = {first[name] for name in weights}
    return WarmStart(
        source=str(source),
        loaded=tuple(name for name in state if name in weights),
        interpolated={
            name: f"{tuple(kept[name].shape)} -> {tuple(weight.shape)}"
            for name, weight in weights.items()
            if kept[name].numel() != weight.numel()
        },
        copied=copied,
        new=tuple(n for n in state if first[n] not in begun and not n.startswith(tuple(copied))),
        left_out=(*(name for name in read.weights if name not in kept), *sorted(read.ignored)),
    )


def _begin_(
    model: PretrainedModel,
    source: str | os.PathLike,
    read: Checkpoint,
    missing: Sequence[str],
    left_out: Sequence[str],
) -> WarmStart:
    """`warm_start_` of a downstream model, by way of the pre-trained one; the checkpoint's momentum
    encoders and queue go on, where the original's do.
    """
    config = model.pretraining.config_class
    known = {field.name for field in fields(config)}
    shared = {name: value for name, value in vars(model.config).items() if name in known}
    trained = model.pretraining(config.from_dict(shared))
    start = warm_start_(trained, source, allow_missing=missing, allow_unexpected=left_out)
    weights = trained.state_dict()
    for name in weights:
        own = read.weights.get(name)
        if name.startswith(tuple(INFERENCE)) and own is not None:
            weights[name] = own if own.shape == weights[name].shape else weights[name]
    state, given = model.state_dict(), model.from_pretraining(weights, model.config)
    begun = {name: weight for name, weight in given.items() if name in state}
    load_weights(model, begun, allow_missing=[name for name in state if name not in begun])
    first = first_names(model)
    tied = {first[name] for name in begun}
    return replace(
        start,
        loaded=tuple(begun),
        copied={},
        new=tuple(name for name in state if first[name] not in tied),
        left_out=(*start.left_out, *(name for name in given if name not in state)),
    )


def _has(names: Iterable[str], part: str) -> bool:
    return any(name.startswith(part) for name in names)


def _absent(
    fills: dict[str, str | None], weights: Iterable[str], state: Iterable[str]
) -> dict[str, str | None]:
    """Those of `fills` whose part the model has, and of which nothing is in `weights`."""
    return {
        part: other
        for part, other in fills.items()
        if _has(state, part) and not _has(weights, part)
    }


def _check_alike(model: PretrainedModel, family: str, said: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint is of another family, or its config computes
    otherwise.
    """
    if family != model.family:
        raise ValueError(f"expected a checkpoint of {model.family!r}, got one of {family!r}")
    ours = vars(model.config)
    differing = [n for n in ours if n.endswith(WITHOUT_TENSOR) and said.get(n, ours[n]) != ours[n]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{name}: expected {ours[name]!r}, as the model has it, in the config of the "
            f"checkpoint, got {said[name]!r}; set {name} of the model to it"
        )


def _check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    unfitted = [each for each in patterns if not any(fnmatchcase(name, each) for name in names)]
    if unfitted:
        raise ValueError(f"{argument}: expected patterns that fit a tensor, got {unfitted}")


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _counted(names: Iterable[str]) -> str:
    """ "visual.blocks 48, visual.pos_embed"."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(part if count == 1 else f"{part} {count}" for part, count in counts.items())
