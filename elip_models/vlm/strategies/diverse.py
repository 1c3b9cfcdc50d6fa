"""Keep the tokens that differ most from each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from elip_models.vlm.strategies.base import ImageTokenStrategy


@dataclass(frozen=True)
class Diverse(ImageTokenStrategy):
    """Keep tokens by greedy max-min selection (DivPrune, Alvar et al., CVPR 2025).

    Each further token is the one whose smallest cosine distance to the tokens that were selected is
    largest.

    Attributes:
        relevance: begin with the token that is most similar to the question, the mean embedding of
            the text; otherwise with the one that differs most from the mean of the image.
        keep: as of `ImageTokenStrategy`.
    """

    name: ClassVar[str] = "diverse"

    relevance: bool = False

    @property
    def reads_question(self) -> bool:
        """Return whether the text counts."""
        return self.relevance

    @torch.no_grad()
    def select(self, tokens: Tensor, count: int, question: Tensor | None) -> Tensor:
        """Select one token after the other."""
        unit = F.normalize(tokens.float(), dim=-1)
        if question is None:
            first = (unit @ unit.mean(1, keepdim=True).mT).squeeze(-1).argmin(1)
        else:
            first = (
                (unit @ F.normalize(question.float(), dim=-1).unsqueeze(-1)).squeeze(-1).argmax(1)
            )
        chosen = [first]
        nearest = unit.new_full(unit.shape[:2], -2.0)  # cosine with the nearest selected token
        rows = torch.arange(len(unit), device=unit.device)
        for _ in range(count - 1):
            cosine = (unit @ unit[rows, chosen[-1]].unsqueeze(-1)).squeeze(-1)
            nearest = torch.maximum(nearest, cosine)
            nearest[rows, chosen[-1]] = 2.0
            chosen.append(nearest.argmin(1))
        return torch.stack(chosen, 1)

    def flops(self, length: int, width: int) -> int:
        """Return a row of cosines for each selected token."""
        return 2 * self.count(length) * length * width
