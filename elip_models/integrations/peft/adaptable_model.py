"""The base class of models that `adapt_` can change."""

from typing import Any, ClassVar, NamedTuple

from torch import nn

from elip_models.integrations.peft.adapt_config import AdaptConfig
from elip_models.towers import SelfReducingModel


class Adapted(NamedTuple):
    """The settings of a model's adapters, and the names of the parameters that trained before."""

    config: AdaptConfig
    trained: frozenset[str]


class AdaptableModel(nn.Module, SelfReducingModel):
    """Base class of models that `adapt_` can change; `adapted` is None for a plain model."""

    family: ClassVar[str]
    config: Any
    adapted: Adapted | None = None

    def new_parameters(self) -> set[str]:
        """Return the names of the parameters that the pre-trained model does not have."""
        return set()
