"""Make vision transformers faster by merging similar image tokens, in inference and in training."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from elip_models.saving.model_registry import register_models
from elip_models.validation import did_you_mean, require_extra

if find_spec("elip_models.pretraining") is not None:  # the core works without it
    register_models("elip_models.pretraining.models.registry")

__all__ = [
    "LANGUAGE_STRATEGIES",
    "AdaptConfig",
    "Schedule",
    "SlowScorerWarning",
    "Stage",
    "StageInfo",
    "Strategy",
    "TokenCounts",
    "UnguidedWarning",
    "__version__",
    "adapt_",
    "budget",
    "calibrate",
    "create_model",
    "distill",
    "embed",
    "encode_image",
    "guidance",
    "is_reduced",
    "list_models",
    "list_strategies",
    "load_reduced",
    "open_model",
    "record_stages",
    "reduce_",
    "reduction_summary",
    "save_reduced",
    "unreduce_",
]

LAZY = {
    "elip_kernels": ("__version__",),
    "elip_models.calibration.calibrate": ("calibrate",),
    "elip_models.embedding.run": ("embed",),
    "elip_models.saving.open_model": ("open_model",),
    "elip_models.saving.saved_reduced": ("load_reduced", "save_reduced"),
    "elip_models.integrations.peft.adapt": ("adapt_",),
    "elip_models.integrations.peft.adapt_config": ("AdaptConfig",),
    "elip_models.pretraining.models.registry": ("create_model", "list_models"),
    "elip_models.engine.encode": ("encode_image",),
    "elip_models.strategies.schedule": ("Schedule", "Stage"),
    "elip_models.strategies.strategy": ("TokenCounts", "StageInfo", "Strategy"),
    "elip_models.user_warnings": ("SlowScorerWarning", "UnguidedWarning"),
    "elip_models.recovery.distill": ("distill",),
    "elip_models.api": (
        "budget",
        "guidance",
        "is_reduced",
        "record_stages",
        "reduce_",
        "reduction_summary",
        "unreduce_",
    ),
    "elip_models.vlm.strategies": ("LANGUAGE_STRATEGIES",),
    "elip_models.vlm.strategy_list": ("list_strategies",),
}
"""The public names of each module, which is imported on first use: `elip --help` needs no torch."""
MODULES = {name: module for module, names in LAZY.items() for name in names}
STRATEGIES_MODULE = "elip_models.strategies"
"""The module whose public names are public here too: the classes of all strategies."""

if TYPE_CHECKING:
    from elip_kernels import __version__
    from elip_models import strategies
    from elip_models.api import (
        budget,
        guidance,
        is_reduced,
        record_stages,
        reduce_,
        reduction_summary,
        unreduce_,
    )
    from elip_models.calibration.calibrate import calibrate
    from elip_models.embedding.run import embed
    from elip_models.engine.encode import encode_image
    from elip_models.integrations.peft.adapt import adapt_
    from elip_models.integrations.peft.adapt_config import AdaptConfig
    from elip_models.pretraining.models.registry import create_model, list_models
    from elip_models.recovery.distill import distill
    from elip_models.saving.open_model import open_model
    from elip_models.saving.saved_reduced import load_reduced, save_reduced
    from elip_models.strategies import *  # noqa: F403, of its __all__
    from elip_models.strategies.schedule import Schedule, Stage
    from elip_models.strategies.strategy import StageInfo, Strategy, TokenCounts
    from elip_models.user_warnings import SlowScorerWarning, UnguidedWarning
    from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
    from elip_models.vlm.strategy_list import list_strategies

    __all__ += strategies.__all__
else:
    NAMES = __all__
    del __all__  # made on first use, with the names of strategies

    def __getattr__(name: str) -> Any:
        """Import a public name on first use."""
        if name.startswith("_") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with require_extra(name):
            module = import_module(MODULES.get(name, STRATEGIES_MODULE))
        if name == "__all__":
            value = sorted([*NAMES, *module.__all__])
        elif name in MODULES or name in module.__all__:
            value = getattr(module, name)
        else:
            close = did_you_mean(name, __getattr__("__all__"))
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{close}")
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        """Return the public names, including those that are not imported yet."""
        return __getattr__("__all__")
