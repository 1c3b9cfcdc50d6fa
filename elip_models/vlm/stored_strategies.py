"""The strategies of a language model in its config, which `save_pretrained` stores.

They are a further entry of the settings that `reduction.hf_config` stores for the image tower:

    {"version": 1, "language_model": [{"version": 1, "strategy": "diverse", "settings": {..}}]}
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from elip_models.engine.hf_config import LANGUAGE_MODEL, replace_config, strategy_in
from elip_models.strategies.serialization import VERSION, settings_of, strategy_of
from elip_models.strategies.strategy import Strategy
from elip_models.validation import check
from elip_models.vlm.families import own_modules
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.base import LanguageStrategy
from elip_models.vlm.strategies.layer_strategy import LayerStrategy


def store_strategies(
    model: nn.Module,
    config: Any,
    of_tower: Strategy | None,
    of_language_model: Sequence[LanguageStrategy],
) -> None:
    """Store the strategies in the config of a model, whose modules get a copy of it.

    Nothing changes without a strategy of the language model, or if the config has them already.
    """
    if not of_language_model:
        return
    tower = {"version": VERSION} if of_tower is None else settings_of(of_tower)
    stored = [settings_of(strategy, LANGUAGE_STRATEGIES) for strategy in of_language_model]
    settings = tower | {LANGUAGE_MODEL: stored}
    if getattr(config, "elip", None) == settings:
        return
    own = copy.copy(config)
    own.elip = settings
    replace_config(own_modules(model), config, own)


def read_strategies(saved: Any) -> tuple[Strategy | None, list[LanguageStrategy]]:
    """Return the strategies of the image tower and of the language model in stored settings.

    Raises:
        TypeError, ValueError: settings of a later version, or an unknown strategy, key or value.
    """
    of_tower = strategy_in(saved)
    of_language_model = saved.get(LANGUAGE_MODEL, [])
    check(LANGUAGE_MODEL, of_language_model, list)
    stored = [strategy_of(settings, LANGUAGE_STRATEGIES) for settings in of_language_model]
    inside = sorted(isinstance(strategy, LayerStrategy) for strategy in stored)
    if LANGUAGE_MODEL in saved and inside not in ([False], [True], [False, True]):
        raise ValueError(
            f"{LANGUAGE_MODEL}: expected one strategy before the language model, one inside it, or "
            f"both, got {len(inside) - sum(inside)} before and {sum(inside)} inside; remove the "
            "others"
        )
    return of_tower, stored
