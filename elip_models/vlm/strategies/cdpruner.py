"""Keep tokens that are relevant to the question and differ from each other."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elip_kernels import select_dpp
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy
from elip_models.vlm.strategies.diverse import similarity


@dataclass(frozen=True)
class CDPruner(ImageTokenStrategy):
    """Keep tokens by a determinantal point process (CDPruner, Zhang et al., NeurIPS 2025).

    The relevance of a token is its cosine with the question, the mean embedding of the text in the
    space of the language model, scaled to [0, 1] in each image. The paper takes it from the text
    tower of CLIP, which a language model does not have.

    Attributes:
        keep: as of `ImageTokenStrategy`.
    """

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "keeps tokens like the question that differ from each other"
    is_guided: ClassVar[bool] = True
    joins_frames: ClassVar[bool] = True

    def select(self, tokens: Tensor, count: int, context: ImageContext) -> Tensor:
        """Select one token after the other."""
        return self.choose(tokens, count, scaled(similarity(tokens, context.question)))

    @staticmethod
    def choose(tokens: Tensor, count: int, relevance: Tensor) -> Tensor:
        """Select `count` tokens with relevance (R, n) in [0, 1]."""
        return select_dpp(tokens, count, relevance=relevance, selection_order=True)

    def flops(self, length: int, width: int) -> int:
        """Return the cosines of all pairs, and the sums over earlier steps."""
        return 2 * length * length * width + self.count(length) ** 2 * length


def scaled(relevance: Tensor) -> Tensor:
    """Scale the relevance (R, n) of each image to [0, 1], a little above 0 at the lowest."""
    low, high = relevance.aminmax(dim=1, keepdim=True)
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
