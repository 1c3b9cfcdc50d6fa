"""The strategy in the config of a model that vLLM serves."""

from dataclasses import fields, replace
from typing import Any

from elip_models.validation import as_config_error, check
from elip_models.vlm.install import language_strategy
from elip_models.vlm.stored_strategies import read_strategies
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.base import ImageTokenStrategy, LanguageStrategy
from elip_models.vlm.strategies.dedup import Dedup

FEWEST_TOKENS = 8
"""The least number of tokens of an image. A lower integer was probably meant to be a share."""


def serving_strategy(settings: Any) -> ImageTokenStrategy | Dedup:
    """Return the strategy of the settings in a model's config, its `elip`.

    The settings are the arguments of `reduce_`, `{"strategy": "diverse", "keep": 0.25}`, or those
    that `save_reduced` has stored.

    Raises:
        ConfigError: a wrong value, or a strategy that cannot act in vLLM, with the reason.
    """
    with as_config_error("elip"):
        strategy = _strategy_of(settings)
        if (reason := _why_unsupported(strategy)) is not None:
            raise ValueError(f"{_refusal(strategy)}: {reason}; pass another one in --hf-overrides")
        if isinstance(strategy.keep, int) and strategy.keep < FEWEST_TOKENS:
            raise ValueError(
                "keep: expected a float in (0, 1] for a share of the tokens, or an int of at "
                f"least {FEWEST_TOKENS} for their number, got {strategy.keep}; pass 0.25 to keep a "
                "quarter of them"
            )
        return strategy


def _strategy_of(settings: Any) -> LanguageStrategy:
    check("settings", settings, dict)
    if "version" not in settings:
        options = dict(settings)
        for name, value in options.items():
            if value is None:
                raise ValueError(
                    f"{name}: expected a value, got None; leave it out for the default"
                )
        return language_strategy(options.pop("strategy", None), options)
    of_tower, strategies = read_strategies(settings)
    names = [strategy.name for strategy in (of_tower, *strategies) if strategy is not None]
    if of_tower is not None or len(strategies) != 1:
        raise ValueError(
            "settings: expected one strategy, before the language model, got "
            f"{' and '.join(names) or 'none'}; pass one in --hf-overrides, or null to serve the "
            "model with every token"
        )
    return strategies[0]


def _refusal(strategy: LanguageStrategy) -> str:
    """Return the beginning of an error: the strategy, or its option that cannot act in vLLM."""
    for field in fields(strategy):
        value = getattr(strategy, field.name)
        if _why_unsupported(replace(strategy, **{field.name: field.default})) is None:
            return (
                f"{field.name}: expected {field.default} for {strategy.name!r} in vLLM, got {value}"
            )
    return f"strategy: expected one of {', '.join(SUPPORTED)} in vLLM, got {strategy.name!r}"


def _why_unsupported(strategy: LanguageStrategy) -> str | None:
    """Return the reason why the strategy cannot act in vLLM, or None."""
    if not isinstance(strategy, ImageTokenStrategy | Dedup):
        return "it acts inside the language model, whose layers read one sequence in vLLM"
    if strategy.reads_question:
        return "it reads the question, and vLLM encodes an image once for all questions"
    if strategy.reads_tower:
        return "it reads the attention of the image tower, which vLLM does not return"
    if strategy.reads_frames:
        return "vLLM has it for videos as --video-pruning-rate"
    return None


SUPPORTED = [
    name for name, strategy in LANGUAGE_STRATEGIES.items() if _why_unsupported(strategy()) is None
]
"""The strategies that can act in vLLM."""
