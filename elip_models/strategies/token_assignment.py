"""The assignment of the tokens of block 0 to the tokens that remain after some steps."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import elip_kernels
from elip_kernels import BipartiteInfo, ReductionInfo


class Slots(NamedTuple):
    """For each token of block 0, the token that it is part of.

    index: (B, N0) int64, the index of that token; `num_tokens` if it was dropped.
    num_tokens: T, the number of remaining tokens.
    drops: whether tokens may have been dropped.
    """

    index: Tensor
    num_tokens: int
    drops: bool

    def after(self, reduction: BipartiteInfo | ReductionInfo) -> "Slots":
        """Return the assignment after one more step."""
        step = slots_of(reduction)
        index = F.pad(step.index, (0, 1), value=step.num_tokens) if self.drops else step.index
        return Slots(index.gather(1, self.index), step.num_tokens, self.drops or step.drops)

    def unmerged(self, tokens: Tensor) -> Tensor:
        """Return for each token of block 0 its token in (B, T, D), or zeros: (B, N0, D)."""
        if self.drops:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        return elip_kernels.unmerge(tokens, BipartiteInfo(self.index, tokens.shape[1]))

    def merged(self, grid: Tensor) -> Tensor:
        """Return the tokens (B, T, D) that `unmerged` has spread over `grid` (B, N0, D)."""
        (B, N, D), T = grid.shape, self.num_tokens
        positions = torch.arange(N, device=grid.device).expand(B, -1)
        first = positions.new_zeros(B, T + 1)
        first = first.scatter_reduce(1, self.index, positions, "amin", include_self=False)
        return grid.gather(1, first[:, :T, None].expand(-1, -1, D))


def slots_after(reductions: Iterable[BipartiteInfo | ReductionInfo]) -> Slots | None:
    """Return the assignment after one or more steps; None without a step."""
    slots = None
    for reduction in reductions:
        slots = slots_of(reduction) if slots is None else slots.after(reduction)
    return slots


def slots_of(reduction: BipartiteInfo | ReductionInfo) -> Slots:
    """Return the assignment of the tokens that enter one step to those that leave it."""
    if isinstance(reduction, BipartiteInfo) or reduction.slots is not None:
        return Slots(reduction.slots.long(), reduction.num_rows, False)
    kept, p = reduction.kept, reduction.num_prefix_tokens
    (B, K), N = kept.shape, reduction.weights.shape[1]
    others = p + K  # the merged token, or none
    slots = torch.arange(others, device=kept.device).expand(B, -1)
    if reduction.mask is not None:
        slots = slots.where(reduction.mask[:, :others], others)
    positions = torch.cat([torch.arange(p, device=kept.device).expand(B, -1), kept], dim=1)
    index = torch.full((B, N), others, device=kept.device).scatter(1, positions, slots)
    return Slots(index, others + reduction.merged, not reduction.merged)
