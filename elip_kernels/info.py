"""Where each token went: what an op that reduces says of its step, and how steps chain.

A source map (B, T, N) is True where output token t holds input token n. One step's map is T x N;
maps chain over steps by "holds something that held", so that T tokens now are traced to N patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from elip_kernels._validate import check_device, check_shape, check_tensor, message
from elip_kernels.ops.gather_ops import take_rows


class ReductionInfo(NamedTuple):
    """What `reduce` or `merge_nearest` kept, and how the others were merged.

    kept: (B, K) int64, positions in `tokens`, of `reduce` ascending; padding that fills slots comes
        last, but stays in its place where all are kept.
    weights: (B, N) fp32 (fp64 if an input is), zero at kept and prefix tokens, and everywhere
        without merging; of `merge_nearest` each token's share of its row.
    mask: (B, R) bool, True where an output token is real; None when no mask was given.
    num_prefix_tokens: p, tokens that stay, first.
    merged: the last output token is the merged one; it holds all that were dropped.
    slots: (B, N) int32, the output row that each token is part of, where all of them are part of a
        kept one; else None.
    """

    kept: Tensor
    weights: Tensor
    mask: Tensor | None
    num_prefix_tokens: int = 1
    merged: bool = True
    slots: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """R, output rows."""
        return self.num_prefix_tokens + self.kept.shape[1] + self.merged

    def source_map(self, earlier: Tensor | None = None) -> Tensor:
        """The tokens that each output token holds: prefix, kept in the order of `kept`, merged.

        What the mask calls no real token holds nothing; padding counts to the merged token, or to
        one that is kept, though it has no weight.

        Args:
            earlier: (B, N, P) bool, the map of the steps before, whose tokens were reduced here.

        Returns:
            (B, T, N) bool, or (B, T, P) where an earlier map is given.
        """
        B, N = self.weights.shape
        if self.slots is not None:
            return _compose(_membership(self.slots, self.num_rows), earlier)
        index = torch.arange(N, device=self.kept.device)
        prefix = index[: self.num_prefix_tokens].expand(B, -1)
        source = torch.cat([prefix, self.kept], dim=1)[..., None] == index
        if self.mask is not None:
            source = source & self.mask[:, : source.shape[1], None]
        if self.merged:
            source = torch.cat([source, ~source.any(1, keepdim=True)], dim=1)
        return _compose(source, earlier)


class BipartiteInfo(NamedTuple):
    """Where each token went.

    slots: (B, N) int32, the output row that each input token is part of.
    num_rows: output rows, N - r.
    """

    slots: Tensor
    num_rows: int

    def source_map(self, earlier: Tensor | None = None) -> Tensor:
        """`source_matrix` (B, N-r, N), or chained to an earlier map (B, N, P): (B, N-r, P)."""
        return _compose(source_matrix(self), earlier)


def unmerge(merged: Tensor, info: BipartiteInfo | ReductionInfo | Tensor) -> Tensor:
    """Give every token the row that it went into, zeros where it was dropped without merging.

    Args:
        merged: (B, T, D), rows after the reduction.
        info: what the reduction returned; or the source map (B, T, N) bool of one or several.

    Returns:
        (B, N, D).
    """
    if isinstance(info, ReductionInfo) and info.slots is None:
        info = info.source_map()
    check_tensor("merged", merged, "(B, T, D)", 3)
    D = merged.shape[2]
    if not isinstance(info, Tensor):
        check_slots(info)
        shape = (info.slots.shape[0], info.num_rows, D)
        check_shape("merged", merged, shape, "(B, T, D)")
        check_device("merged", merged, "info.slots", info.slots)
        return take_rows(merged, info.slots)
    if info.dtype != torch.bool or info.dim() != 3:
        raise TypeError(message("info", "a source map (B, T, N) bool", info))
    check_shape("merged", merged, (*info.shape[:2], D), "(B, T, D)")
    check_device("merged", merged, "info", info)
    holds, rows = info.to(torch.uint8).max(1)
    return take_rows(merged, rows).masked_fill((holds == 0)[..., None], 0.0)


def source_matrix(info: BipartiteInfo) -> Tensor:
    """(B, N-r, N) bool: True where the input token is part of the output row."""
    check_slots(info)
    return _membership(info.slots, info.num_rows)


def check_slots(info: BipartiteInfo | ReductionInfo) -> None:
    """Raises TypeError where it does not say of each token which row it is part of."""
    if not isinstance(info, (BipartiteInfo, ReductionInfo)) or info.slots is None:
        expected = "the info that bipartite_merge or merge_nearest returns"
        raise TypeError(message("info", expected, info))


def _membership(slots: Tensor, num_rows: int) -> Tensor:
    """Slots (B, N) -> (B, R, N) bool: True where the input token is part of the output row."""
    rows = torch.arange(num_rows, device=slots.device)
    return slots[:, None, :] == rows[None, :, None]


def _compose(source: Tensor, earlier: Tensor | None) -> Tensor:
    """Source (B, T, N) after earlier (B, N, P) -> (B, T, P), all bool."""
    if earlier is None:
        return source
    expected = f"a source map (B, N, P) bool with (B, N) = {tuple(source.shape[::2])}"
    if not isinstance(earlier, Tensor) or earlier.dtype != torch.bool:
        raise TypeError(message("earlier", expected, earlier))
    if earlier.dim() != 3 or earlier.shape[:2] != source.shape[::2]:
        raise ValueError(message("earlier", expected, earlier))
    check_device("earlier", earlier, "the info", source)
    return torch.matmul(source.float(), earlier.float()) > 0
