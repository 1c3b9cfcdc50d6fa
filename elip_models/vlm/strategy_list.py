"""The strategies that `reduce_` takes: where they act, what guides them, and their default rate."""

import re
from typing import NamedTuple

from torch import nn

from elip_models.strategies import STRATEGIES
from elip_models.strategies.flops import DEFAULT_KEEP
from elip_models.strategies.strategy import Strategy, tower_of
from elip_models.towers import Tower
from elip_models.towers.unsupported import PLAIN
from elip_models.vlm.families import find_multimodal, unsupported_config
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES


class StrategyEntry(NamedTuple):
    """One strategy of `list_strategies`.

    Attributes:
        name: what `reduce_` takes.
        place: where it acts, such as 'every block'.
        is_guided: whether a text changes which tokens stay.
        keep: the rate if the caller sets none; None if a rate has no meaning.
        summary: what it does, in at most ten words.
        why_unsupported: the reason why it cannot reduce the model, or None.
    """

    name: str
    place: str
    is_guided: bool
    keep: float | None
    summary: str
    why_unsupported: str | None = None


def list_strategies(model: nn.Module | None = None) -> list[StrategyEntry]:
    """Return all strategies by which `reduce_` can reduce a model.

        [entry.name for entry in elip_models.list_strategies(model) if not entry.why_unsupported]

    Args:
        model: a model as of `reduce_`, whose entries have the reasons of those that it cannot take.
            None: the strategies without a model.

    Raises:
        TypeError: no strategy can reduce the model, with the reason. Of a multimodal language
            model whose image tower cannot be reduced, the entries have that reason instead.
    """
    multimodal, tower = find_multimodal(model), None
    of_image = of_language = None
    if model is not None:
        try:
            tower = tower_of(model)
        except TypeError as error:
            if multimodal is None:
                raise
            of_image = reason_of(error)
        if multimodal is None:
            config, of_language = unsupported_config(model), "it needs a multimodal language model"
            if config is not None:
                of_language += f" of a supported family, not of {config.model_type!r}"
    entries = [_image_entry(cls(), tower, of_image) for cls in STRATEGIES.values()]
    for name, cls in LANGUAGE_STRATEGIES.items():
        strategy = cls()
        reason = strategy.why_unsupported(multimodal) if multimodal else of_language
        entries.append(
            StrategyEntry(name, cls.place, cls.is_guided, strategy.keep, cls.summary, reason)
        )
    return entries


def _image_entry(strategy: Strategy, tower: Tower | None, reason: str | None) -> StrategyEntry:
    """Return the entry of a strategy of image towers; `reason` is why there is no tower."""
    if tower is not None:
        try:
            strategy.fitted(tower)
        except (TypeError, ValueError) as error:
            reason = reason_of(error)
    keep = None if strategy.keep_field is None else DEFAULT_KEEP
    place, summary = strategy.place, strategy.summary
    return StrategyEntry(strategy.name, place, strategy.is_guided, keep, summary, reason)


def reason_of(error: Exception) -> str:
    """Return the part of an error message after 'got NAME: ', without the remedy of most models."""
    return re.sub(r"^.*? got '?\w+'?: ", "", str(error)).removesuffix(f"; {PLAIN}")
