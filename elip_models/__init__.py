"""Text-guided vision token reduction for image-text models, and the models that train with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elip_kernels import __version__
from elip_models.reduction.encode import encode_image
from elip_models.reduction.patch import (
    guidance,
    is_reduced,
    record_stages,
    reduce_,
    reduction_summary,
    unreduce_,
)
from elip_models.reduction.schedule import Schedule, Stage
from elip_models.reduction.strategies import (
    ELIP,
    STRATEGIES,
    TRIPS,
    AdaptiveELIP,
    CrossGET,
    Dense,
    EViT,
    GuidedToMe,
    ImageResize,
    PatchDropout,
    PiToMe,
    RandomPruning,
    ToMe,
)
from elip_models.reduction.strategy import Layer, StageInfo, Strategy
from elip_models.reduction.user_warnings import SlowScorerWarning, UnguidedWarning
from elip_models.towers.sdpa import use_sdpa_
from elip_models.validation import require_extra

__all__ = [
    "ELIP",
    "STRATEGIES",
    "TRIPS",
    "AdaptConfig",
    "AdaptiveELIP",
    "CrossGET",
    "Dense",
    "EViT",
    "GuidedToMe",
    "ImageResize",
    "Layer",
    "PatchDropout",
    "PiToMe",
    "RandomPruning",
    "Schedule",
    "SlowScorerWarning",
    "Stage",
    "StageInfo",
    "Strategy",
    "ToMe",
    "UnguidedWarning",
    "__version__",
    "adapt_",
    "create_model",
    "encode_image",
    "guidance",
    "is_reduced",
    "list_models",
    "load_reduced",
    "open_model",
    "record_stages",
    "reduce_",
    "reduction_summary",
    "save_reduced",
    "unreduce_",
    "use_sdpa_",
]

LAZY = {
    "AdaptConfig": "peft.adaptable_model",
    "adapt_": "peft.adapt",
    "create_model": "registry",
    "list_models": "registry",
    "load_reduced": "io.saved_reduced",
    "open_model": "io.open_model",
    "save_reduced": "io.saved_reduced",
}

if TYPE_CHECKING:
    from elip_models.models.io.open_model import open_model
    from elip_models.models.io.saved_reduced import load_reduced, save_reduced
    from elip_models.models.peft.adapt import adapt_
    from elip_models.models.peft.adaptable_model import AdaptConfig
    from elip_models.models.registry import create_model, list_models
else:

    def __getattr__(name: str) -> Any:
        """Import a public name that needs timm or transformers, on first use."""
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with require_extra(name):
            return getattr(import_module(f"elip_models.models.{LAZY[name]}"), name)

    def __dir__() -> list[str]:
        """Return the public names, including those that are not imported yet."""
        return __all__
