"""Where each token of block 0 is now, after the steps of a forward, and back again."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import elip_kernels
from elip_kernels import BipartiteInfo, ReductionInfo


class Slots(NamedTuple):
    """Which token each of block 0 is part of.

    index: (B, N0) int64, `num_tokens` where it was dropped.
    num_tokens: T, tokens now.
    drops: some may have been dropped; else all are part of one.
    """

    index: Tensor
    num_tokens: int
    drops: bool

    def after(self, reduction: BipartiteInfo | ReductionInfo) -> "Slots":
        """Where they are behind one more step."""
        step = slots_of(reduction)
        index = F.pad(step.index, (0, 1), value=step.num_tokens) if self.drops else step.index
        return Slots(index.gather(1, self.index), step.num_tokens, self.drops or step.drops)

    def unmerged(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D) -> (B, N0, D), of each the one that it is part of, zeros if of none."""
        if self.drops:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        return elip_kernels.unmerge(tokens, BipartiteInfo(self.index, tokens.shape[1]))

    def merged(self, grid: Tensor) -> Tensor:
        """What `unmerged` made of tokens (B, T, D) -> these, each from its first place."""
        (B, N, D), T = grid.shape, self.num_tokens
        places = torch.arange(N, device=grid.device).expand(B, -1)
        first = places.new_zeros(B, T + 1)
        first = first.scatter_reduce(1, self.index, places, "amin", include_self=False)
        return grid.gather(1, first[:, :T, None].expand(-1, -1, D))


def slots_of(reduction: BipartiteInfo | ReductionInfo) -> Slots:
    """Where the tokens that entered one step are behind it."""
    if isinstance(reduction, BipartiteInfo) or reduction.slots is not None:
        return Slots(reduction.slots.long(), reduction.num_rows, False)
    kept, p = reduction.kept, reduction.num_prefix_tokens
    (B, K), N = kept.shape, reduction.weights.shape[1]
    others = p + K  # the merged token's slot, or that of none
    slots = torch.arange(others, device=kept.device).expand(B, -1)
    if reduction.mask is not None:
        slots = slots.where(reduction.mask[:, :others], others)
    places = torch.cat([torch.arange(p, device=kept.device).expand(B, -1), kept], dim=1)
    index = torch.full((B, N), others, device=kept.device).scatter(1, places, slots)
    return Slots(index, others + reduction.merged, not reduction.merged)
