"""Records of a reduction: which input tokens each output token contains.

A source map (B, T, N) is True where output token t contains input token n. The maps of successive
steps compose, so that T output tokens are traced back to the N patches of the first step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._validate import (
    check_dense,
    check_device,
    check_flags,
    check_mask,
    check_positions,
    check_prefix,
    check_range,
    check_shape,
    check_tensor,
    message,
)
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
        if self.slots is not None:
            return _compose(source_matrix(self), earlier)
        check_tensor("info.weights", self.weights, "(B, N)", 2)
        B, N = self.weights.shape
        _check_reduction(self, B, N)
        check_device("info.kept", self.kept, "info.weights", self.weights)
        check_positions("info.kept", self.kept, self.num_prefix_tokens, N)
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
        mask: (B, N-r) bool, True where an output row is real; None without padding.
    """

    slots: Tensor
    num_rows: int
    mask: Tensor | None = None

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
        check_match(info)
        shape = (info.slots.shape[0], info.num_rows, D)
        check_shape("merged", merged, shape, "(B, T, D)")
        check_device("merged", merged, "info.slots", info.slots)
        return take_rows(merged, info.slots)
    check_dense("info", info, "a source map", "(B, T, N) bool")
    if info.dtype != torch.bool or info.dim() != 3:
        raise TypeError(message("info", "a source map (B, T, N) bool", info))
    check_shape("merged", merged, (*info.shape[:2], D), "(B, T, D)")
    check_device("merged", merged, "info", info)
    if info.shape[1] == 0:
        return merged.new_zeros(info.shape[0], info.shape[2], D)
    is_source, rows = info.to(torch.uint8).max(1)
    return take_rows(merged, rows).masked_fill((is_source == 0)[..., None], 0.0)


def source_matrix(info: BipartiteInfo | ReductionInfo) -> Tensor:
    """Return (B, R, N) bool, True where the output row contains the input token."""
    check_match(info)
    rows = torch.arange(info.num_rows, device=info.slots.device)
    return info.slots[:, None, :] == rows[None, :, None]


def check_match(info: BipartiteInfo | ReductionInfo) -> None:
    """Check that `info` has an output row for each token, and its values where readable."""
    if not isinstance(info, (BipartiteInfo, ReductionInfo)) or info.slots is None:
        expected = "the info that bipartite_merge or merge_nearest returns"
        raise TypeError(message("info", expected, info))
    slots = info.slots
    check_dense("info.slots", slots, "output rows", "(B, N) int32")
    if slots.dtype not in (torch.int32, torch.int64) or slots.dim() != 2:
        raise TypeError(message("info.slots", "output rows (B, N) int32", slots))
    if isinstance(info, ReductionInfo):
        _check_reduction(info, *slots.shape)
    R = info.num_rows
    if isinstance(R, Tensor) and torch.jit.is_tracing():  # sizes are tensors there
        R = int(R)
    if isinstance(R, bool) or not isinstance(R, (int, torch.SymInt)):
        raise TypeError(message("info.num_rows", "an int", R))
    if not 1 <= R <= slots.shape[1] + 1:
        raise ValueError(message("info.num_rows", f"1 to {slots.shape[1] + 1} rows", R))
    check_range("info.slots", slots, 0, R - 1)


def _check_reduction(info: ReductionInfo, B: int, N: int) -> None:
    """Check the fields of a `ReductionInfo` of N tokens, which a caller may have made."""
    p, kept = info.num_prefix_tokens, info.kept
    check_prefix(p, N)
    check_flags(merged=info.merged)
    check_dense("info.kept", kept, "positions", "(B, K) int64")
    if kept.dtype != torch.int64 or kept.dim() != 2 or kept.shape[0] != B or kept.shape[1] > N - p:
        expected = f"positions (B, K) int64 with B = {B} and K <= N-p = {N - p}"
        raise ValueError(message("info.kept", expected, kept))
    names = {"argument": "info.mask", "names": "(B, R)"}
    check_mask(info.mask, (B, info.num_rows), "info.kept", kept, **names)


def _compose(source: Tensor, earlier: Tensor | None) -> Tensor:
    """Return the map (B, T, P) of `source` (B, T, N) after `earlier` (B, N, P), all bool."""
    if earlier is None:
        return source
    expected = f"a source map (B, N, P) bool with (B, N) = {tuple(source.shape[::2])}"
    check_dense("earlier", earlier, "a source map", "(B, N, P) bool")
    if earlier.dtype != torch.bool:
        raise TypeError(message("earlier", expected, earlier))
    if earlier.dim() != 3 or earlier.shape[:2] != source.shape[::2]:
        raise ValueError(message("earlier", expected, earlier))
    check_device("earlier", earlier, "the info", source)
    return torch.matmul(source.float(), earlier.float()) > 0


@example_of(unmerge, has_kernels=False)
def _example(sizes: Sizes) -> Arguments:
    slots = torch.arange(sizes.N, dtype=torch.int32).expand(sizes.B, -1) % sizes.K
    return {"merged": sizes.images(sizes.K, sizes.D), "info": BipartiteInfo(slots, sizes.K)}
