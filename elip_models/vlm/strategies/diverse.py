"""Keep the tokens that differ most from each other."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from elip_kernels import select_diverse
from elip_kernels.ops.select_diverse import first_smallest
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy


@dataclass(frozen=True)
class Diverse(ImageTokenStrategy):
    """Keep tokens by greedy max-min selection (DivPrune, Alvar et al., CVPR 2025).

    Each further token is the one whose smallest cosine distance to the selected tokens is largest.

    Attributes:
        relevance: begin with the token that is most similar to the question, the mean embedding of
            the text; otherwise with the token whose nearest other token is farthest.
        keep: as of `ImageTokenStrategy`.
    """

    name: ClassVar[str] = "diverse"
    summary: ClassVar[str] = "keeps the tokens that differ most from each other"
    joins_frames: ClassVar[bool] = True

    relevance: bool = False

    @property
    def reads_question(self) -> bool:
        return self.relevance

    def select(self, tokens: Tensor, count: int, context: ImageContext) -> Tensor:
        """Select one token after the other."""
        question, first = context.question, None
        if question is not None:
            first = first_smallest(-similarity(tokens, question))
        return select_diverse(tokens, count, first=first, selection_order=True)

    def flops(self, length: int, width: int) -> int:
        """Return the cosines of all pairs."""
        return 2 * length * length * width


def similarity(tokens: Tensor, question: Tensor) -> Tensor:
    """Return (R, n) fp32 cosines of tokens (R, n, D) and of one vector (R, D) for each image."""
    unit = F.normalize(question.float(), dim=-1).unsqueeze(-1)
    return (F.normalize(tokens.float(), dim=-1) @ unit).squeeze(-1)
