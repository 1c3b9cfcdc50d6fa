"""What a library's own config says of how a model is reduced, for `save_pretrained` to carry.

Several models may share one config object, and one of them alone is reduced. So the
strategy is written into a copy, which the modules of that model use in the object's place;
`remove_from_config` puts the object back, unless the model's own has changed since.
"""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from elip_models.reduction.serialization import settings_of, strategy_of
from elip_models.reduction.reduced_model import Reduction
from elip_models.reduction.strategy import Strategy
from elip_models.towers import ImageTextModel, Tower
from elip_models.validation import as_config_error


def store_in_config(model: nn.Module, reduction: Reduction) -> None:
    """Say in the library's config, if it saves one, how `model`, or the one inside it, is
    reduced.
    """
    owner = reduction.image_text or reduction.tower
    if owner.saved_config is None:
        return
    if reduction.shared_config is None:
        reduction.shared_config = owner.saved_config
        _replace(model.modules(), reduction.shared_config, copy.copy(reduction.shared_config))
    owner.saved_config.elip = settings_of(reduction.strategy)


def strategy_in_config(owner: ImageTextModel | Tower) -> Strategy | None:
    """What the library's config says of how a model was reduced when it was saved."""
    config = owner.saved_config
    saved = getattr(config, "elip", None)
    if saved is None:
        return None
    with as_config_error(f"{type(config).__name__}.elip"):
        return strategy_of(saved)


def remove_from_config(modules: Iterable[nn.Module], reductions: Iterable[Reduction]) -> None:
    """The configs of the modules say no more of it; another model that has one keeps it."""
    modules = list(modules)
    found = {id(config): config for module in modules if (config := _config_of(module)) is not None}
    shared = [each.shared_config for each in reductions if each.shared_config is not None]
    for config in found.values():
        if getattr(config, "elip", None) is None:
            continue
        own = copy.copy(config)
        del own.elip
        same = (each for each in shared if type(each) is type(own) and vars(each) == vars(own))
        _replace(modules, config, next(same, own))


def _replace(modules: Iterable[nn.Module], config: Any, by: Any) -> None:
    for module in modules:
        if _config_of(module) is config:
            module.config = by


def _config_of(module: nn.Module) -> Any:
    return vars(module).get("config")
