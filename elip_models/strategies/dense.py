"""The strategy that reduces nothing."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elip_models.strategies.schedule import Stage
from elip_models.strategies.strategy import Strategy, TokenCounts, counts_of
from elip_models.towers import TowerSize


@dataclass(frozen=True)
class Dense(Strategy):
    """Keep all tokens of all blocks."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "keeps all tokens"
    place: ClassVar[str] = "nowhere"

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return no stage."""
        return ()

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return all tokens in every block."""
        return counts_of(size, lambda i, tokens: tokens)

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        """Return False."""
        return False

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        """Return the strategy unchanged."""
        return self
