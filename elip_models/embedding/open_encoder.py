"""Opening of the model that embeds, by a text: with a library's prefix, a folder, or on the hub."""

import os
import warnings
from pathlib import Path

from torch import nn

from elip_models.models.base import PretrainedModel
from elip_models.models.io.dense_models import CONFIG, OPEN_CLIP_CONFIG, NewPartsWarning
from elip_models.models.io.files import read_object
from elip_models.models.io.open_model import open_model, split_spec, split_weights
from elip_models.models.io.saved_reduced import SETTINGS, load_reduced
from elip_models.models.registry import elip_strategy, is_family, list_models
from elip_models.reduction.flops import check_share
from elip_models.reduction.patch import reduce_, reductions_of, unreduce_
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategy import Strategy
from elip_models.reduction.strategy_spec import resolve_strategy
from elip_models.validation import (
    ConfigError,
    as_config_error,
    shortened,
)

FORMS = (
    "'timm:NAME', 'timm:NAME:FILE', 'open_clip:NAME', 'open_clip:NAME:TAG', a folder of "
    "save_reduced, of a run, of save_pretrained or of transformers, or 'hf:NAME' on the hub"
)
DENSE = "none"
"""The reduction that leaves a model dense."""


def open_embedding_model(spec: str, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model that a text names, and its parts that have no weights.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
        ImportError: a library is missing; the message names the extra.
    """
    if not isinstance(spec, str):
        raise ConfigError(f"model: expected a text, {FORMS}, got {shortened(spec)}")
    with warnings.catch_warnings(record=True) as caught, as_config_error("model", inner="spec"):
        warnings.simplefilter("always")
        model = _open(spec, pretrained)
    new: tuple[str, ...] = ()
    for each in caught:
        if isinstance(each.message, NewPartsWarning):
            new = each.message.parts
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return model.eval(), new


def _open(spec: str, pretrained: bool) -> nn.Module:
    if os.path.isdir(spec):
        folder = model_folder(spec)
        if _is_reduced(folder):
            return load_reduced(folder)
        is_ours = is_family(read_object(folder / CONFIG).get("model"))
        return open_model(str(folder) if is_ours else f"hf:{folder}", pretrained=pretrained)
    if split_spec(spec)[0] is None and spec not in list_models():
        raise ValueError(f"expected {FORMS}, got {shortened(spec)}")
    return open_model(spec, pretrained=pretrained)


def model_folder(spec: str) -> Path:
    """Return the folder of a saved model: `spec` itself, or `model` in the folder of a run."""
    folder = Path(spec)
    inner = folder / "model"
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def _is_reduced(folder: Path) -> bool:
    """Return whether `save_reduced` wrote a folder of another library's model."""
    if (folder / SETTINGS).is_file() or (folder / OPEN_CLIP_CONFIG).is_file():
        return True
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}, nor in {folder / 'model'}")
    config = read_object(folder / CONFIG)
    return "elip" in config and not is_family(config.get("model"))


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
        if not isinstance(model, PretrainedModel):
            return unreduce_(model)
        model.reduction = model.dense
        return model
    with as_config_error("reduce", inner="strategy"):
        if not isinstance(model, PretrainedModel):
            return reduce_(model, reduce, keep=keep)
        default = lambda: elip_strategy(model)  # noqa: E731
        model.reduction = resolve_strategy(model.tower, reduce, {}, keep=keep, default=default)
    return model


def strategy_in(model: nn.Module) -> Strategy | None:
    """Return the strategy that reduces a model, or None if it is dense."""
    if isinstance(model, PretrainedModel):
        return None if isinstance(model.reduction, Dense) else model.reduction
    found = reductions_of(model)
    return found[0].strategy if found and not isinstance(found[0].strategy, Dense) else None
