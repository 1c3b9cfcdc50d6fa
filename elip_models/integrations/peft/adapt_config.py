"""The settings of an adapter."""

import re
from dataclasses import dataclass
from typing import Literal

from elip_models.validation import Config, Positive, PositiveInt, Rate, shortened


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"target_modules: expected a regular expression, or a list of names, got "
                    f"{shortened(self.target_modules)}: {error}"
                ) from error
