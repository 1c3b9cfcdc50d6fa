"""The base class of models that `adapt_` can change, and the settings of an adapter."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import nn

from elip_models.models.config import Config
from elip_models.towers.reducible_model import ReducibleModel
from elip_models.validation import Positive, PositiveInt, Rate


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(Config):
    """How a model is fine-tuned.

    Attributes:
        kind: 'lora', 'adapter', or None, which trains all parameters.
        r: rank of LoRA.
        alpha: LoRA scales its product of matrices by alpha / r.
        dropout: dropout of the input of LoRA's matrices.
        width: width of the bottleneck of 'adapter'.
        target_modules: ends of the names of the layers to adapt, or one regular expression that
            matches whole names, as in peft. None: the model's entry in `TARGETS`.
        full: patterns of names of other parameters that train, `*` for any part. None: temperatures
            and the parameters that a downstream model adds, such as a new head.
    """

    kind: Literal["lora", "adapter"] | None = None
    r: PositiveInt = 8
    alpha: Positive = 16.0
    dropout: Rate = 0.0
    width: PositiveInt = 64
    target_modules: str | tuple[str, ...] | None = None
    full: tuple[str, ...] | None = None


class Adapted(NamedTuple):
    """The settings of a model's adapters, and the names of the parameters that trained before."""

    config: AdaptConfig
    trained: frozenset[str]


class AdaptableModel(nn.Module, ReducibleModel):
    """Base class of models that `adapt_` can change; `adapted` is None for a plain model."""

    family: ClassVar[str]
    config: Any
    adapted: Adapted | None = None

    def new_parameters(self) -> set[str]:
        """Return the names of the parameters that the pre-trained model does not have."""
        return set()
