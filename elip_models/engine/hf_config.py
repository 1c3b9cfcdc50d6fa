"""The strategy in a model's own config, which `save_pretrained` of transformers stores.

Several models may share one config object while only one of them is reduced. So the strategy is
written into a copy, which the modules of that model use instead. `remove_from_config` restores the
shared object, unless the copy has changed otherwise.

A model that transformers makes of such a config is dense, until `reduce_` applies what it stores.
"""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from elip_models.engine.reduction import Reduction
from elip_models.strategies.serialization import check_stored, settings_of, strategy_of
from elip_models.strategies.strategy import Strategy
from elip_models.towers import ImageTextModel, Tower
from elip_models.validation import as_config_error

LANGUAGE_MODEL = "language_model"
"""The entry of the settings with the strategies of a multimodal language model."""


def store_in_config(reduction: Reduction) -> None:
    """Store the strategy in the model's config, if its library saves one."""
    owner = reduction.image_text or reduction.tower
    if owner.saved_config is None:
        return
    if reduction.shared_config is None:
        reduction.shared_config = owner.saved_config
        modules = reduction.tower.own_modules(reduction.model)
        replace_config(modules, reduction.shared_config, copy.copy(reduction.shared_config))
    owner.saved_config.elip = settings_of(reduction.strategy)


def strategy_in_config(owner: ImageTextModel | Tower) -> Strategy | None:
    """Return the strategy that a model was saved with, or None."""
    config = owner.saved_config
    saved = stored_in(config)
    if saved is None:
        return None
    with as_config_error(f"{type(config).__name__}.elip"):
        return strategy_in(saved)


def strategy_in(saved: Any) -> Strategy | None:
    """Return the strategy in stored settings, or None in those of a language model alone."""
    if isinstance(saved, dict) and LANGUAGE_MODEL in saved:
        saved = {key: value for key, value in saved.items() if key != LANGUAGE_MODEL}
        if "strategy" not in saved:
            check_stored(saved, known=("version",))
            return None
    return strategy_of(saved)


def remove_from_config(modules: list[nn.Module], shared: Any) -> None:
    """Remove the strategy from the configs of the modules; other models keep theirs.

    A config that was a copy of `shared` is replaced by it.
    """
    own_configs = map(_config_of, modules)
    configs = {id(config): config for config in own_configs if config is not None}
    for config in configs.values():
        if stored_in(config) is None:
            continue
        own = copy.copy(config)
        del own.elip
        is_same = type(shared) is type(own) and vars(shared) == vars(own)
        replace_config(modules, config, shared if is_same else own)


def replace_config(modules: Iterable[nn.Module], config: Any, by: Any) -> None:
    """Replace a config object by another in all modules that use it."""
    for module in modules:
        if _config_of(module) is config:
            module.config = by


def stored_in(config: Any) -> Any:
    """Return the settings in a config, or None; a config of the paper's models has a method."""
    return None if config is None else vars(config).get("elip")


def _config_of(module: nn.Module) -> Any:
    """Return the module's own config, or None."""
    return vars(module).get("config")
