"""Controls: random tokens, tokens at equal distances, and the mean of neighbouring tokens."""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy


@dataclass(frozen=True)
class RandomTokens(ImageTokenStrategy):
    """Keep random tokens, by the generator of the context or of the tokens' device."""

    name: ClassVar[str] = "random_tokens"
    summary: ClassVar[str] = "control: keeps random tokens"

    def select(self, tokens: Tensor, count: int, context: ImageContext) -> Tensor:
        """Draw without replacement."""
        drawn = torch.rand(tokens.shape[:2], device=tokens.device, generator=context.generator)
        return drawn.topk(count, dim=1).indices


@dataclass(frozen=True)
class Stride(ImageTokenStrategy):
    """Keep tokens at equal distances in their order, the last one included."""

    name: ClassVar[str] = "stride"
    summary: ClassVar[str] = "control: keeps tokens at equal distances"

    def select(self, tokens: Tensor, count: int, context: ImageContext) -> Tensor:
        """Return the last token of each of `count` equal parts."""
        ends = torch.arange(1, count + 1, device=tokens.device) * tokens.shape[1] // count - 1
        return ends.expand(len(tokens), -1)


@dataclass(frozen=True)
class Pool(ImageTokenStrategy):
    """Average the tokens of a square grid to a smaller grid.

    Needs `keep` that gives a square number of tokens, and images of a square number of tokens: a
    smaller grid of another shape would not cover the image. The means stand at the last positions
    of their areas.
    """

    name: ClassVar[str] = "pool"
    summary: ClassVar[str] = "control: averages neighbouring tokens of a square grid"

    def count(self, length: int, keep: float | int | None = None) -> int:
        """Return the largest square number of tokens that `keep` allows.

        Raises:
            ValueError: the tokens are not a square grid.
        """
        count = super().count(length, keep)
        if count == length:
            return length
        if isqrt(length) ** 2 != length:
            raise ValueError(
                f"strategy: expected images of a square number of tokens for 'pool', got {length}; "
                "take another strategy, such as 'stride'"
            )
        return isqrt(count) ** 2

    def reduce(
        self, tokens: Tensor, count: int, context: ImageContext
    ) -> tuple[Tensor, Tensor | None]:
        """Return the means, at the positions of the lower right corners of their areas."""
        R, n, D = tokens.shape
        side, new = isqrt(n), isqrt(count)
        grid = tokens.transpose(1, 2).reshape(R, D, side, side)
        means = F.adaptive_avg_pool2d(grid.float(), new).flatten(2).transpose(1, 2)
        ends = -(-torch.arange(1, new + 1, device=tokens.device) * side // new) - 1
        corners = (ends[:, None] * side + ends).flatten()
        return corners.expand(R, -1), means.to(tokens.dtype)

    def flops(self, length: int, width: int) -> int:
        """Return one addition for each number."""
        return length * width
