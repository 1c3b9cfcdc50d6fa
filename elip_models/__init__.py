"""Text-guided vision token reduction for image-text models, and the models that train with it."""

from typing import Any

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
from elip_models.reduction.strategies import STRATEGIES, PatchDropout, Random, Resize, Trips
from elip_models.reduction.strategies.adaptive import Adaptive
from elip_models.reduction.strategies.elip import Elip
from elip_models.reduction.strategies.evit import EViT
from elip_models.reduction.strategies.tome import ToMe
from elip_models.towers.sdpa import use_sdpa_

__all__ = [
    "STRATEGIES",
    "Adaptive",
    "EViT",
    "Elip",
    "PatchDropout",
    "Random",
    "Resize",
    "Schedule",
    "SlowScorerWarning",
    "ToMe",
    "Trips",
    "UnguidedWarning",
    "create_model",
    "encode_image",
    "guidance",
    "is_reduced",
    "record",
    "reduce_",
    "summary",
    "unreduce_",
    "use_sdpa_",
]


def __getattr__(name: str) -> Any:
    """`create_model` on first use: it brings timm and transformers in."""
    if name == "create_model":
        try:
            from elip_models.models.registry import create_model
        except ModuleNotFoundError as error:
            raise ImportError(
                f"create_model needs {error.name}: pip install 'elip-kernels[models]'"
            ) from error
        return create_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
