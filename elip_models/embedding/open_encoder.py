"""Opening of the model that embeds, by a text: with a library's prefix, a folder, or on the hub."""

import os
import warnings

from torch import nn

from elip_models.api import reduce_, strategies_in, unreduce_
from elip_models.reduction.flops import check_share
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategy import Strategy
from elip_models.saving.dense_models import OPEN_CLIP_CONFIG, NewPartsWarning
from elip_models.saving.open_model import model_folder, open_model, split_spec, split_weights
from elip_models.validation import (
    ConfigError,
    as_config_error,
)

DENSE = "none"
"""The reduction that leaves a model dense."""


def open_embedding_model(spec: str, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model that a text names, and its parts that have no weights.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
        ImportError: a library is missing; the message names the extra.
    """
    with warnings.catch_warnings(record=True) as caught, as_config_error("model", inner="spec"):
        warnings.simplefilter("always")
        model = open_model(spec, pretrained=pretrained)
    new: tuple[str, ...] = ()
    for each in caught:
        if isinstance(each.message, NewPartsWarning):
            new = each.message.parts
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return model.eval(), new


def tokenizer_name(spec: str) -> str:
    """Return what a model's `load_tokenizer` takes: the name in its library, or a folder."""
    if os.path.isdir(spec):
        folder = model_folder(spec)
        is_open_clip = (folder / OPEN_CLIP_CONFIG).is_file()
        return f"local-dir:{folder}" if is_open_clip else str(folder)
    library, name = split_spec(spec)
    return split_weights(name)[0] if library == "open_clip" else name


def set_reduction(model: nn.Module, reduce: str | Strategy | None, keep: float | None) -> nn.Module:
    """Reduce a model in place, or make it dense.

    Args:
        model: image model or image-text model.
        reduce: a strategy, a line of text that describes one, or a file of `calibrate`; 'none' for
            dense. None and no `keep`: the reduction with which the model was saved, if any.
        keep: mean share of tokens over the layers.

    Raises:
        ConfigError: the model cannot be reduced like this.
    """
    with as_config_error("keep", inner="keep"):
        check_share(keep)
    if reduce is None and keep is None:
        return model
    if reduce == DENSE:
        if keep is not None:
            raise ConfigError(f"keep: expected none with reduce='none', got {keep}")
        return unreduce_(model)
    with as_config_error("reduce", inner="strategy"):
        return reduce_(model, reduce, keep=keep)


def strategy_in(model: nn.Module) -> Strategy | None:
    """Return the strategy that reduces a model, or None if it is dense."""
    return next(
        (strategy for strategy in strategies_in(model) if not isinstance(strategy, Dense)), None
    )
