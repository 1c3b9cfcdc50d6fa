"""The assignment of the tokens of block 0 to the tokens that remain after some steps.

A block that returns all tokens of block 0 gives to each of them, after a step that turned x into y,

    x_after = x + (y_after - y) = y_after - (y - x)

that is, a merged token keeps its own values, and changes as the token does that it is part of. The
shifts y - x add up over the steps. A dropped token has y = 0: it keeps its values.
"""

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
    shift: (B, N0, D), how far the steps have moved the values of each token; None: not at all.
    """

    index: Tensor
    num_tokens: int
    drops: bool
    shift: Tensor | None = None

    def after(
        self, reduction: BipartiteInfo | ReductionInfo, shift: Tensor | None = None
    ) -> "Slots":
        """Return the assignment after one more step, which moved its tokens by (B, T, D)."""
        step = slots_of(reduction)
        index = F.pad(step.index, (0, 1), value=step.num_tokens) if self.drops else step.index
        total = self.shift
        if shift is not None:
            total = self._repeated(shift) if total is None else self._repeated(shift).add_(total)
        return Slots(index.gather(1, self.index), step.num_tokens, self.drops or step.drops, total)

    def unmerged(self, tokens: Tensor) -> Tensor:
        """Return the tokens of block 0 (B, N0, D) after blocks whose tokens are (B, T, D)."""
        grid = self._repeated(tokens)
        return grid if self.shift is None else grid.sub_(self.shift)

    def _repeated(self, tokens: Tensor) -> Tensor:
        """Return for each token of block 0 its token in (B, T, D), or zeros: (B, N0, D)."""
        if self.drops:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        return elip_kernels.unmerge(tokens, BipartiteInfo(self.index, tokens.shape[1]))

    def merged(self, grid: Tensor) -> Tensor:
        """Return the tokens (B, T, D) of which `unmerged` has made `grid` (B, N0, D)."""
        (B, N, D), T = grid.shape, self.num_tokens
        positions = torch.arange(N, device=grid.device).expand(B, -1)
        first = positions.new_zeros(B, T + 1)
        first = first.scatter_reduce(1, self.index, positions, "amin", include_self=False)
        first = first[:, :T, None].expand(-1, -1, D)
        tokens = grid.gather(1, first)
        return tokens if self.shift is None else tokens.add_(self.shift.gather(1, first))


def slots_after(
    slots: Slots | None, reduction: BipartiteInfo | ReductionInfo, shift: Tensor | None
) -> Slots:
    """Return the assignment after one more step, which moved its tokens by `shift`."""
    if slots is None:
        return slots_of(reduction)._replace(shift=shift)
    return slots.after(reduction, shift)


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
