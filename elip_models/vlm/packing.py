"""A sequence without its removed tokens: rows packed to the length of the longest, at the right."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which tokens of a batch of sequences remain, and where.

    order: (B, M) the position of each remaining token in its sequence, ascending. Rows that keep
        fewer than M tokens begin with positions of removed tokens, as padding.
    real: (B, M) bool, False for padding.
    length: the length N of the sequences.
    """

    order: Tensor
    real: Tensor
    length: int

    @classmethod
    def of(cls, kept: Tensor) -> Self:
        """Pack the tokens that `kept` (B, N) bool names."""
        longest = int(kept.sum(1).max())
        order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, -longest:]
        return cls(order, kept.gather(1, order), kept.shape[1])

    def rows(self, values: Tensor) -> Tensor:
        """Return (B, M, ..) of values (B, N, ..)."""
        index = self.order.view(*self.order.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(-1, -1, *values.shape[2:]))

    def positions(self, positions: Tensor) -> Tensor:
        """Return (.., B, M) of position ids (.., B, N), where B may be 1."""
        shape = (*positions.shape[:-2], len(self.order), self.length)
        order = self.order.expand(*shape[:-2], *self.order.shape)
        return positions.expand(shape).gather(-1, order)

    def scatter(self, hidden: Tensor) -> Tensor:
        """Return (B, N, D) of hidden states (B, M, D), with zeros for removed tokens."""
        hidden = torch.where(self.real.unsqueeze(-1), hidden, 0)
        index = self.order.unsqueeze(-1).expand_as(hidden)
        full = hidden.new_zeros(len(hidden), self.length, hidden.shape[-1])
        return full.scatter(1, index, hidden)


def gather_columns(mask: Tensor, columns: Tensor) -> Tensor:
    """Return (B, .., K) of a mask (B, .., T) at columns (B, K)."""
    index = columns.view(len(columns), *[1] * (mask.dim() - 2), columns.shape[1])
    mask = mask.expand(len(columns), *mask.shape[1:])
    return mask.gather(-1, index.expand(*mask.shape[:-1], -1))


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return a mask that also hides the columns `hidden` (B, K) bool."""
    if mask.dim() == 2:
        return mask * ~hidden
    hidden = hidden[:, None, None]
    value: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(hidden, value)
