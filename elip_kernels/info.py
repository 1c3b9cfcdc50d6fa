"""Records of a reduction: which input tokens each output token contains.

A source map (B, T, N) is True where output token t contains input token n. The maps of successive
steps compose, so that T output tokens are traced back to the N patches of the first step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from elip_kernels._validate import check_device, check_shape, check_tensor, message
from elip_kernels.ops.gather_ops import take_rows


class ReductionInfo(NamedTuple):
    """The tokens that `reduce` or `merge_nearest` kept, and how the others were merged.

    Attributes:
        kept: (B, K) int64, positions of the kept tokens in `tokens`. `reduce` returns them
            ascending, with kept padding last unless all tokens are kept.
        weights: (B, N) fp32 (fp64 if an input is fp64), merge weights. They are 0 for kept and
            prefix tokens, and all 0 without merging. For `merge_nearest`, the share of each token
            in its output row.
        mask: (B, R) bool, True where an output token is real; None if no mask was given.
        num_prefix_tokens: p, the number of leading tokens that are always kept.
        merged: whether the last output token contains all dropped tokens.
        slots: (B, N) int32, the output row that contains each token, if every token is part of a
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
        """Return the number of output rows, R."""
        return self.num_prefix_tokens + self.kept.shape[1] + (1 if self.merged else 0)

    def source_map(self, earlier: Tensor | None = None) -> Tensor:
        """Return which tokens each output token contains: prefix, `kept` in order, merged.

        The row of a masked token is empty. Masked tokens count as part of the merged token, or of
        a kept one, although their weight is 0.

        Args:
            earlier: (B, N, P) bool, the map of the earlier steps, whose tokens were reduced here.

        Returns:
            (B, T, N) bool, or (B, T, P) if an earlier map is given.
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
    """The output row that each token was merged into by `bipartite_merge`.

    Attributes:
        slots: (B, N) int32, the output row that contains each input token.
        num_rows: number of output rows, N - r.
    """

    slots: Tensor
    num_rows: int

    def source_map(self, earlier: Tensor | None = None) -> Tensor:
        """Return the map (B, N-r, N) bool, or (B, N-r, P) after an `earlier` map (B, N, P)."""
        return _compose(source_matrix(self), earlier)


def unmerge(merged: Tensor, info: BipartiteInfo | ReductionInfo | Tensor) -> Tensor:
    """Copy each output row back to the tokens that were merged into it.

    A token that was dropped without merging gets zeros. Example::

        merged, size, info = elip_kernels.bipartite_merge(tokens, keys, 16, return_info=True)
        features = elip_kernels.unmerge(merged, info)  # (B, N, D)

    Args:
        merged: (B, T, D), fp32, bf16, fp16 or fp64, the rows after the reduction.
        info: what the reduction returned; or a source map (B, T, N) bool of one or more steps.

    Returns:
        (B, N, D) in the dtype of `merged`. Gradients reach `merged`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
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
    is_source, rows = info.to(torch.uint8).max(1)
    return take_rows(merged, rows).masked_fill((is_source == 0)[..., None], 0.0)


def source_matrix(info: BipartiteInfo) -> Tensor:
    """Return (B, N-r, N) bool, True where the output row contains the input token."""
    check_slots(info)
    return _membership(info.slots, info.num_rows)


def check_slots(info: BipartiteInfo | ReductionInfo) -> None:
    """Check that `info` has an output row for each token; raise TypeError otherwise."""
    if not isinstance(info, (BipartiteInfo, ReductionInfo)) or info.slots is None:
        expected = "the info that bipartite_merge or merge_nearest returns"
        raise TypeError(message("info", expected, info))


def _membership(slots: Tensor, num_rows: int) -> Tensor:
    """Return (B, R, N) bool from slots (B, N): True where row r contains token n."""
    rows = torch.arange(num_rows, device=slots.device)
    return slots[:, None, :] == rows[None, :, None]


def _compose(source: Tensor, earlier: Tensor | None) -> Tensor:
    """Return the map (B, T, P) of `source` (B, T, N) after `earlier` (B, N, P), all bool."""
    if earlier is None:
        return source
    expected = f"a source map (B, N, P) bool with (B, N) = {tuple(source.shape[::2])}"
    if not isinstance(earlier, Tensor) or earlier.dtype != torch.bool:
        raise TypeError(message("earlier", expected, earlier))
    if earlier.dim() != 3 or earlier.shape[:2] != source.shape[::2]:
        raise ValueError(message("earlier", expected, earlier))
    check_device("earlier", earlier, "the info", source)
    return torch.matmul(source.float(), earlier.float()) > 0
