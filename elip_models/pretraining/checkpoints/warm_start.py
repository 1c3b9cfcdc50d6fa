"""Warm start: initialise a new model from a checkpoint, and list where each tensor comes from.

Momentum encoders start as copies and a queue starts random, even if the checkpoint has them: a warm
start does not resume training. A downstream model instead uses `from_pretraining`, with momentum
encoders and queue if the original implementation does. Sizes, schedule and tokens are the model's
own. Heads, activation and epsilons, which no tensor determines, must match the checkpoint's config.
"""

import os
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from elip_models.pretraining.checkpoints.load import (
    Checkpoint,
    LoadReport,
    load_checkpoint_,
    read_checkpoint,
)
from elip_models.pretraining.checkpoints.names import MOMENTUM
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.saving.weights import first_names, load_weights

WITHOUT_TENSOR = ("_heads", "_norm_eps", "activation")
"""Suffixes of fields that change the output, but not the shape of any weight."""


def warm_start_(
    model: PretrainedModel,
    source: str | os.PathLike,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> LoadReport:
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
        ValueError: the checkpoint does not fit the model. The model is unchanged then.
    """
    checkpoint = read_checkpoint(Path(source))
    missing, unexpected = tuple(allow_missing), tuple(allow_unexpected)
    if model.task is None or checkpoint.family == model.family:
        return _load_(model, checkpoint, missing, unexpected)
    config = model.pretraining.config_class
    shared = {field.name: getattr(model.config, field.name) for field in fields(config)}
    pretrained = model.pretraining(config(**shared))
    report = _load_(pretrained, checkpoint, missing, unexpected)
    weights = pretrained.state_dict()
    for name, weight in checkpoint.weights.items():
        is_momentum = name in weights and name.startswith(tuple(MOMENTUM))
        if is_momentum and weight.shape == weights[name].shape:
            weights[name] = weight
    state, mapped = model.state_dict(), model.from_pretraining(weights, model.config)
    loaded = {name: weight for name, weight in mapped.items() if name in state}
    load_weights(model, loaded, allow_missing=[name for name in state if name not in loaded])
    first = first_names(model)
    tied = {first[name] for name in loaded}
    return replace(
        report,
        loaded=tuple(loaded),
        copied={},
        new=tuple(name for name in state if first[name] not in tied),
        left_out=(*report.left_out, *(name for name in mapped if name not in state)),
    )


def _load_(
    model: PretrainedModel,
    checkpoint: Checkpoint,
    missing: tuple[str, ...],
    unexpected: tuple[str, ...],
) -> LoadReport:
    """Load a checkpoint whose config fits, without its momentum encoders and queue."""
    if checkpoint.family != model.family:
        raise ValueError(
            f"expected a checkpoint of {model.family!r}, got one of {checkpoint.family!r}"
        )
    for name, ours in vars(model.config).items():
        theirs = checkpoint.fields.get(name, ours)
        if name.endswith(WITHOUT_TENSOR) and theirs != ours:
            raise ValueError(
                f"{name}: expected {ours!r}, as in the model, in the config of the checkpoint, got "
                f"{theirs!r}; set {name} of the model to this value"
            )
    report = load_checkpoint_(
        model, checkpoint, allow_missing=missing, allow_unexpected=unexpected, momentum=False
    )
    model.reset_momentum_()
    return report
