"""A sequence without its removed tokens: rows packed to the length of the longest, at the right."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F


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

    @classmethod
    def identity(cls, batch: int, length: int, device: torch.device) -> Self:
        """Return the packing that keeps every token."""
        order = torch.arange(length, device=device).expand(batch, -1)
        return cls(order, torch.ones_like(order, dtype=torch.bool), length)

    def with_real(self, real: Tensor) -> Self:
        """Return the packing in which tokens beside `real` (B, M) bool are padding too."""
        return type(self)(self.order, self.real & real, self.length)

    def then(self, later: Self) -> Self:
        """Return the packing that `later` makes of the sequence packed by this one."""
        real = self.real.gather(1, later.order) & later.real
        return type(self)(self.order.gather(1, later.order), real, self.length)

    def on(self, device: torch.device) -> Self:
        """Return the packing on a device: layers of a model may lie on several."""
        if self.order.device == device:
            return self
        return type(self)(self.order.to(device), self.real.to(device), self.length)

    def kept(self) -> Tensor:
        """Return (B, N) bool, the tokens that remain."""
        return self.scatter_flags(self.real)

    def scatter_flags(self, flags: Tensor) -> Tensor:
        """Return (B, N) bool of flags (B, M), False for removed tokens."""
        return self.scatter(flags.unsqueeze(-1)).squeeze(-1).bool()

    def features(self, values: Tensor) -> Tensor:
        """Return (.., B, M, D) of values (.., B, N, D), where B may be 1."""
        *front, _, _, D = values.shape
        values = values.expand(*front, len(self.order), self.length, D)
        order = self.on(values.device).order
        order = order.unsqueeze(-1).expand(*front, *order.shape, D)
        return values.gather(-2, order)

    def rows(self, values: Tensor) -> Tensor:
        """Return (B, M, ..) of values (B, N, ..)."""
        order = self.on(values.device).order
        index = order.view(*order.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(-1, -1, *values.shape[2:]))

    def positions(self, positions: Tensor) -> Tensor:
        """Return (.., B, M) of position ids (.., B, N), where B may be 1."""
        shape = (*positions.shape[:-2], len(self.order), self.length)
        order = self.on(positions.device).order.expand(*shape[:-2], *self.order.shape)
        return positions.expand(shape).gather(-1, order)

    def places(self, positions: Tensor) -> Tensor:
        """Return where tokens that remain, at positions (B, K), stand in the packed sequence."""
        places = torch.arange(self.order.shape[1], device=self.order.device).expand_as(self.order)
        inverse = self.order.new_zeros(len(self.order), self.length).scatter(1, self.order, places)
        return inverse.gather(1, positions)

    def scatter(self, hidden: Tensor) -> Tensor:
        """Return (B, N, D) of hidden states (B, M, D), with zeros for removed tokens."""
        here = self.on(hidden.device)
        hidden = torch.where(here.real.unsqueeze(-1), hidden, 0)
        index = here.order.unsqueeze(-1).expand_as(hidden)
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


def find_runs(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row, the first position and the length of each run of tokens, on the CPU."""
    edges = F.pad(images.to("cpu", torch.int8), (1, 1)).diff(dim=1)
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    ends = (edges == -1).nonzero(as_tuple=True)[1]
    return rows, starts, ends - starts


def runs_by_length(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows (R, 1) and positions (R, n) of the runs of n image tokens, for each n."""
    rows, starts, lengths = find_runs(images)
    for length in lengths.unique().tolist():
        these = lengths == length
        positions = starts[these, None] + torch.arange(length)
        yield rows[these, None].to(images.device), positions.to(images.device)
