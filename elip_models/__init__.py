"""Text-guided vision token reduction for image-text models, and the models that train with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "PatchDropout",
    "PiToMe",
    "RandomPruning",
    "Schedule",
    "SlowScorerWarning",
    "Stage",
    "StageInfo",
    "Strategy",
    "ToMe",
    "TokenCounts",
    "UnguidedWarning",
    "__version__",
    "adapt_",
    "calibrate",
    "create_model",
    "distill",
    "embed",
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
    "elip_kernels": ("__version__",),
    "elip_models.analysis.calibrate": ("calibrate",),
    "elip_models.embedding.run": ("embed",),
    "elip_models.models.io.open_model": ("open_model",),
    "elip_models.models.io.saved_reduced": ("load_reduced", "save_reduced"),
    "elip_models.models.peft.adapt": ("adapt_",),
    "elip_models.models.peft.adapt_config": ("AdaptConfig",),
    "elip_models.models.registry": ("create_model", "list_models"),
    "elip_models.reduction.encode": ("encode_image",),
    "elip_models.reduction.patch": ("guidance",),
    "elip_models.reduction.schedule": ("Schedule", "Stage"),
    "elip_models.reduction.strategies": (
        *("ELIP", "STRATEGIES", "TRIPS", "AdaptiveELIP", "CrossGET", "Dense", "EViT", "GuidedToMe"),
        *("ImageResize", "PatchDropout", "PiToMe", "RandomPruning", "ToMe"),
    ),
    "elip_models.reduction.strategy": ("StageInfo", "Strategy", "TokenCounts"),
    "elip_models.reduction.user_warnings": ("SlowScorerWarning", "UnguidedWarning"),
    "elip_models.towers.sdpa": ("use_sdpa_",),
    "elip_models.training.distill": ("distill",),
    "elip_models.vlm.patch": (
        *("is_reduced", "record_stages", "reduce_", "reduction_summary", "unreduce_"),
    ),
}
"""The public names of each module, which is imported on first use: `elip --help` needs no torch."""
MODULES = {name: module for module, names in LAZY.items() for name in names}

if TYPE_CHECKING:
    from elip_kernels import __version__
    from elip_models.analysis.calibrate import calibrate
    from elip_models.embedding.run import embed
    from elip_models.models.io.open_model import open_model
    from elip_models.models.io.saved_reduced import load_reduced, save_reduced
    from elip_models.models.peft.adapt import adapt_
    from elip_models.models.peft.adapt_config import AdaptConfig
    from elip_models.models.registry import create_model, list_models
    from elip_models.reduction.encode import encode_image
    from elip_models.reduction.patch import guidance
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
    from elip_models.reduction.strategy import StageInfo, Strategy, TokenCounts
    from elip_models.reduction.user_warnings import SlowScorerWarning, UnguidedWarning
    from elip_models.towers.sdpa import use_sdpa_
    from elip_models.training.distill import distill
    from elip_models.vlm.patch import (
        is_reduced,
        record_stages,
        reduce_,
        reduction_summary,
        unreduce_,
    )
else:

    def __getattr__(name: str) -> Any:
        """Import a public name on first use."""
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with require_extra(name):
            return globals().setdefault(name, getattr(import_module(MODULES[name]), name))

    def __dir__() -> list[str]:
        """Return the public names, including those that are not imported yet."""
        return __all__
