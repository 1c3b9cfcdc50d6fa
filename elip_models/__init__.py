"""Text-guided vision token reduction for image-text models, and the models that train with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elip_kernels import __version__
from elip_models.reduction.encode import encode_image
from elip_models.reduction.once import SlowScorerWarning, UnguidedWarning
from elip_models.reduction.patch import (
    guidance,
    is_reduced,
    record,
    reduce_,
    summary,
    unreduce_,
)
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.strategies import (
    STRATEGIES,
    Adaptive,
    CrossGET,
    Dense,
    Elip,
    EViT,
    GuidedToMe,
    PatchDropout,
    PiToMe,
    Random,
    Resize,
    ToMe,
    Trips,
)
from elip_models.towers.sdpa import use_sdpa_
from elip_models.validation import extra

__all__ = [
    "STRATEGIES",
    "Adaptive",
    "CrossGET",
    "Dense",
    "EViT",
    "Elip",
    "GuidedToMe",
    "PatchDropout",
    "PiToMe",
    "Random",
    "Resize",
    "Schedule",
    "SlowScorerWarning",
    "ToMe",
    "Trips",
    "UnguidedWarning",
    "__version__",
    "create_model",
    "encode_image",
    "guidance",
    "is_reduced",
    "load_reduced",
    "record",
    "reduce_",
    "save_reduced",
    "summary",
    "unreduce_",
    "use_sdpa_",
]

LAZY = {"create_model": "registry", "load_reduced": "saved", "save_reduced": "saved"}

if TYPE_CHECKING:
    from elip_models.models.registry import create_model
    from elip_models.models.saved import load_reduced, save_reduced
else:

    def __getattr__(name: str) -> Any:
        """What brings timm and transformers in, on first use."""
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with extra(name):
            return getattr(import_module(f"elip_models.models.{LAZY[name]}"), name)

    def __dir__() -> list[str]:
        """The public names, also those that are not imported yet."""
        return __all__
