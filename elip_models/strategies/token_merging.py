"""The default strategy: ToMe that compares whole tokens and keeps their norms."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from elip_models.strategies.tome import ToMe


@dataclass(frozen=True)
class TokenMerging(ToMe):
    """Merge the most similar tokens in every block, and keep their norms.

    This is `ToMe(compare="tokens", keep_norm=True)`, which changes the features of a pretrained
    model less than the paper's form, at the same rate. `ToMe` is the paper's form.

    Attributes:
        r, proportional, compare, keep_norm, class_token_only, position, decrease, reach: as of
            `ToMe`.
    """

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "merges the most similar tokens, and keeps their norms"

    compare: Literal["mean_key", "keys", "tokens"] = "tokens"
    keep_norm: bool = True
