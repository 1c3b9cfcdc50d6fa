"""The strategy in the config of a model that vLLM serves."""

from typing import Any

from elip_models.validation import as_config_error, check
from elip_models.vlm.install import language_strategy
from elip_models.vlm.stored_strategies import read_strategies
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.base import ImageTokenStrategy, LanguageStrategy
from elip_models.vlm.strategies.dedup import Dedup


def serving_strategy(config: Any) -> ImageTokenStrategy | None:
    """Return the strategy in `config.elip`, or None without settings.

    The settings are the arguments of `reduce_`, `{"strategy": "diverse", "keep": 0.25}`, or those
    that `save_reduced` has stored.

    Raises:
        ConfigError: a wrong value, or a strategy that cannot act in vLLM, with the reason.
    """
    settings = getattr(config, "elip", None)
    if settings is None:
        return None
    with as_config_error("elip"):
        strategy = _strategy_of(settings)
        if (reason := _why_unsupported(strategy)) is not None:
            raise ValueError(
                f"strategy: expected one of {', '.join(SUPPORTED)} in vLLM, got "
                f"{strategy.name!r}: {reason}; pass another one in --hf-overrides"
            )
        return strategy


def _strategy_of(settings: Any) -> LanguageStrategy:
    check("settings", settings, dict)
    if "version" not in settings:
        options = dict(settings)
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


def _why_unsupported(strategy: LanguageStrategy) -> str | None:
    """Return the reason why the strategy cannot act in vLLM, or None."""
    if isinstance(strategy, Dedup):
        return "it removes patches before the image tower, which is another one in vLLM"
    if not isinstance(strategy, ImageTokenStrategy):
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
