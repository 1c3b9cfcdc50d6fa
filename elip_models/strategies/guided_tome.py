"""ToMe that protects the tokens which a text attends to: they merge last.

x~_cls  = lam * x_cls + (1 - lam) * t_cls                                          ELIP, Eq. 1
a       = this block's CLS row, of x~_cls, read from the tokens as they enter it
penalty = 3 [a is among the `protect` largest] + weight * a / max a

ToMe merges the r tokens of set A that are most similar to their partners in B. Here, it merges the
r with the largest difference of similarity and penalty. Two cosines differ by at most 2, so a
protected token merges only after all others. Other tokens may still merge into it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elip_kernels.ops.gather_ops import largest
from elip_models.strategies.elip import ELIP, Guided, query_of
from elip_models.strategies.shares import floor_of
from elip_models.strategies.strategy import Context, refuse_symbols
from elip_models.strategies.tome import ToMe
from elip_models.towers import Tower, TowerSize
from elip_models.towers.base import scoring_context
from elip_models.validation import NonNegative, Rate, Share

PROTECTION = 3.0  # more than any two cosines differ by


@dataclass(frozen=True)
class GuidedToMe(Guided, ToMe):
    """Merge as ToMe does, but protect the tokens with the most text-guided CLS attention.

    This strategy is new in this project: the step of ToMe with the attention row of ELIP.

    Attributes:
        r, proportional, compare, keep_norm, class_token_only, position, decrease, reach: as of
            `ToMe`.
        protect: the share of patches in every block that merge only if no others are left, in
            [0, 1).
        weight: the factor of a token's attention, relative to the largest, against its similarity.
        fusion, guidance_norm, without_text: as of `ELIP`.
    """

    name: ClassVar[str] = "guided_tome"
    summary: ClassVar[str] = "as `tome`, but patches with high CLS attention merge last"

    protect: Rate = 0.3
    weight: NonNegative = 0.0
    fusion: Share = ELIP.fusion
    guidance_norm: Literal["none", "match"] = ELIP.guidance_norm
    without_text: Literal["dense", "vision"] | None = ELIP.without_text

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of ToMe, and of a CLS row in every block that merges."""
        rows = sum(size.row_flops(n) for n in self.merging_counts(size))
        return super().scoring_flops(size) + rows

    def penalty(self, tower: Tower, i: int, tokens: Tensor, context: Context) -> Tensor:
        """Return the penalty (B, N) of each token by block i's CLS row."""
        p, mask = tower.num_prefix_tokens, context.mask
        with scoring_context(tower.trunk, tokens):
            cls = query_of(tower, tokens, context.text_cls, self).fused()
            row = tower.cls_attention(i, tokens, cls, mask=mask)
            patches = row[:, p:]
            refuse_symbols(patches.shape[1:], self.name)
            count = floor_of(self.protect, patches.shape[1])
            protected = largest(patches, count) + p
            least = torch.finfo(row.dtype).tiny
            importance = row / patches.amax(1, keepdim=True).clamp(min=least)
            added = torch.full_like(protected, PROTECTION, dtype=row.dtype)
            if mask is not None:  # each image protects a share of its own patches
                own = floor_of(self.protect, mask[:, p:].sum(1))
                added *= torch.arange(count, device=added.device) < own[:, None]
            return (self.weight * importance).scatter_add(1, protected, added)
