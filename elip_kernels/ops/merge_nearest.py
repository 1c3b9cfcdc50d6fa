"""Merge each dropped token into the most similar kept token, by a size-weighted mean.

    tokens x (B, N, D), p prefix tokens first;  kept (B, K) positions, all others are dropped
    unit    = metric / |metric| in fp32
    slot_n  = n for a prefix token, p + k for kept_k, and for a dropped token
              p + argmax_k unit_n . unit_(kept_k)                    ties: the lower k
    S_i     = sum of size_n over slot_n = i;  w_n = size_n / S_(slot_n)
    out_i   = sum of w_n x_n over slot_n = i                         (B, p+K, D), sizes S (B, p+K)
    grad_x_n = w_n grad_out_(slot_n)

Ties are ties of the computed values. Prefix tokens do not change, and nothing is merged into them.
A metric row with NaN, or whose squared norm is not a normal number, has no direction: as target it
ranks last, and as source it joins the first kept token. There is no gradient to metric and size.
The merge, and the dtype of its sums, are those of `bipartite.py`. The kernel never stores the
similarities, 2 B N K C operations in tiles. It also computes those of kept tokens, which is cheaper
than to leave them out.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import is_interpreted, tl, triton, wrap_triton
from elip_kernels._validate import (
    check_dense,
    check_device,
    check_flags,
    check_mask,
    check_metric,
    check_positions,
    check_prefix,
    check_tokens,
    message,
)
from elip_kernels.info import ReductionInfo
from elip_kernels.ops.bipartite import merge_op, shares, unit_rows
from elip_kernels.ops.bipartite_arguments import check_size, check_size_values
from elip_kernels.ops.bipartite_kernels import SMALLEST_SQUARE, inverse_norm, tile_products
from elip_kernels.ops.gather_ops import accumulator, take_rows


@overload
def merge_nearest(
    tokens: Tensor, kept: Tensor, metric: Tensor, *, size: Tensor | None = ...,
    mask: Tensor | None = ..., num_prefix_tokens: int = ..., return_info: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def merge_nearest(
    tokens: Tensor, kept: Tensor, metric: Tensor, *, size: Tensor | None = ...,
    mask: Tensor | None = ..., num_prefix_tokens: int = ..., return_info: Literal[True],
) -> tuple[Tensor, Tensor, ReductionInfo]: ...  # fmt: skip
@overload
def merge_nearest(
    tokens: Tensor, kept: Tensor, metric: Tensor, *, size: Tensor | None = ...,
    mask: Tensor | None = ..., num_prefix_tokens: int = ..., return_info: bool,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ReductionInfo]: ...  # fmt: skip
def merge_nearest(
    tokens: Tensor,
    kept: Tensor,
    metric: Tensor,
    *,
    size: Tensor | None = None,
    mask: Tensor | None = None,
    num_prefix_tokens: int = 1,
    return_info: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ReductionInfo]:
    """Merge each token that is not kept into the kept token with the most similar metric.

    Example::

        kept = elip_kernels.select_tokens(attn, 0.5)
        tokens, size = elip_kernels.merge_nearest(tokens, kept, keys.mean(1))

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64. Gradients reach tokens only.
        kept: (B, K) int64, different positions from p to N-1 for each image, in the order of the
            output; -1 is a row of padding. Values are checked on the CPU, outside of graphs.
        metric: (B, N, C), features whose cosine is the similarity, such as the mean of the keys
            over heads.
        size: (B, N) or (B, N, 1) fp32 or fp64, how many patches each token represents, or another
            weight such as attention; not negative. None means 1 for each.
        mask: (B, N) bool, True = real. Padding is not merged, and nothing is merged into it.
        num_prefix_tokens: p, the number of leading tokens that are always kept.
        return_info: also return a `ReductionInfo`.

    Returns:
        merged (B, p+K, D) in the dtype of `tokens`: prefix tokens, then kept ones, each the mean
        of the tokens merged into it; size (B, p+K) fp32 (fp64 for fp64 tokens), the sums of their
        sizes; with `return_info`, a `ReductionInfo`. Rows of padding and their sizes are zero.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    check_tokens(tokens)
    (B, N, _), p = tokens.shape, num_prefix_tokens
    check_prefix(p, N)
    _check_kept(kept, tokens, p)
    check_metric(metric, tokens)
    size = check_size(size, tokens)
    check_mask(mask, (B, N), "tokens", tokens)
    check_flags(return_info=return_info)
    targets = kept
    if mask is not None:
        is_real = (kept >= 0) & mask.gather(1, kept.clamp(0, N - 1))
        targets = kept.masked_fill(~is_real, -1)
        tokens = tokens.masked_fill(~mask[..., None], 0.0)
        size = mask.to(accumulator(tokens)) if size is None else size.masked_fill(~mask, 0.0)
    check_size_values(size)
    slots = _match_op(metric.detach(), targets, p)
    merged, sizes = merge_op(tokens, size, slots, p + kept.shape[1])
    if not return_info:
        return merged, sizes
    mask = None if mask is None else torch.cat([mask[:, :p], is_real], dim=1)
    weights = shares(size, sizes, slots)
    return merged, sizes, ReductionInfo(kept, weights, mask, p, merged=False, slots=slots)


def _check_kept(kept: Tensor, tokens: Tensor, num_prefix_tokens: int) -> None:
    (B, N, _), expected = tokens.shape, "positions (B, K) int64 with 1 <= K <= N-p"
    check_dense("kept", kept, "positions", "(B, K) int64")
    if kept.dtype != torch.int64:
        raise TypeError(message("kept", expected, kept, "elip_kernels.select_tokens makes them"))
    fits = kept.dim() == 2 and kept.shape[0] == B
    if not fits or not 1 <= kept.shape[1] <= N - num_prefix_tokens:
        raise ValueError(message("kept", f"{expected} = {N - num_prefix_tokens}, B = {B}", kept))
    check_device("kept", kept, "tokens", tokens)
    check_positions("kept", kept, num_prefix_tokens, N)


def match_reference(metric: Tensor, kept: Tensor, num_prefix_tokens: int) -> Tensor:
    """Compute the matching in PyTorch; return slots (B, N) int32."""
    (B, N, _), K, p = metric.shape, kept.shape[1], num_prefix_tokens
    unit, is_target = unit_rows(metric), (kept >= 0) & (kept < N)
    similarity = unit @ take_rows(unit, kept.clamp(0, N - 1)).mT  # (B, N, K)
    least = torch.finfo(similarity.dtype).min
    similarity = similarity.masked_fill(similarity.isnan(), least)
    partner = similarity.masked_fill(~is_target[:, None], float("-inf")).max(2).indices
    rows = torch.arange(p, p + K, device=metric.device).expand(B, -1)
    slots = F.pad(p + partner, (0, 1)).scatter(1, kept.where(is_target, N), rows)[:, :N].int()
    slots[:, :p] = torch.arange(p, device=metric.device).expand(B, -1)
    return slots


LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["N", "K"])
def _nearest_kernel(
    metric_ptr, kept_ptr, slots_ptr, stride_mb, stride_mn, N, K, C,
    P: tl.constexpr, SMALLEST_SQUARE: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Find the nearest kept token of each token. Grid: (image, BLOCK_A tokens)."""
    pid_b = tl.program_id(0).to(tl.int64)
    metric_ptr += pid_b * stride_mb
    kept_ptr += pid_b * K
    offs_n = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_n = offs_n < N
    best = tl.full([BLOCK_A], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK_A], tl.int32)
    own = tl.full([BLOCK_A], -1, tl.int32)
    offs_k = tl.arange(0, BLOCK_B)
    following = tl.load(kept_ptr + offs_k, mask=offs_k < K, other=-1)
    for start_k in range(0, K, BLOCK_B):
        kept = following.to(tl.int32)  # prefetches the next tile
        is_kept = (kept >= 0) & (kept < N)
        offs_k = start_k + tl.arange(0, BLOCK_B)
        further = offs_k + BLOCK_B
        following = tl.load(kept_ptr + further, mask=further < K, other=-1)
        product, square_n, square_k = tile_products(
            metric_ptr, stride_mn, offs_n, kept, mask_n, is_kept, C,
            WIDEN, BLOCK_A, BLOCK_B, BLOCK_C,
        )  # fmt: skip
        similarity = product * inverse_norm(square_k, SMALLEST_SQUARE)[None, :]
        similarity = similarity * inverse_norm(square_n, SMALLEST_SQUARE)[:, None]
        similarity = tl.where(similarity == similarity, similarity, LEAST)
        similarity = tl.where(is_kept[None, :], similarity, float("-inf"))
        tile_best, tile_nearest = tl.max(similarity, 1, return_indices=True)
        is_better = tile_best > best
        best = tl.where(is_better, tile_best, best)
        nearest = tl.where(is_better, start_k + tile_nearest, nearest)
        is_own = kept[None, :] == offs_n[:, None]
        own = tl.maximum(own, tl.max(tl.where(is_own, offs_k[None, :], -1), 1))
    slot = P + tl.where(own < 0, nearest, own)
    slot = tl.where(offs_n < P, offs_n, slot)
    tl.store(slots_ptr + pid_b * N + offs_n, slot, mask=mask_n)


def _match(metric: Tensor, kept: Tensor, num_prefix_tokens: int) -> Tensor:
    """Allocate and launch."""
    (B, N, C), K = metric.shape, kept.shape[1]
    metric, kept = launch.addressable(metric), kept.contiguous()
    slots = metric.new_empty(B, N, dtype=torch.int32)
    settings = launch.bipartite_match(C, metric.element_size())
    launch.run(
        wrap_triton(_nearest_kernel),
        (B, launch.cdiv(N, settings["BLOCK_A"])),
        *(metric, kept, slots, metric.stride(0), metric.stride(1), N, K, C),
        P=num_prefix_tokens,
        SMALLEST_SQUARE=SMALLEST_SQUARE,
        WIDEN=is_interpreted(),
        **settings,
    )
    return slots


def _match_flops(metric_shape, kept_shape, *args, **kwargs) -> int:
    """Return a multiply and an add for each channel of each pair of a token and a kept token."""
    (B, N, C), K = metric_shape, kept_shape[1]
    return 2 * B * N * K * C


_match_op = Operator(
    "nearest_match",
    match_reference,
    launcher=_match,
    unsupported=lambda metric, *_: launch.unsupported(metric, candidates=metric.shape[1] - 1),
    fake=lambda metric, *_: metric.new_empty(metric.shape[:2], dtype=torch.int32),
    flops=_match_flops,
)


@example_of(merge_nearest)
def _example(sizes: Sizes) -> Arguments:
    kept = 1 + torch.rand(sizes.B, sizes.N - 1).topk(sizes.K).indices
    metric = sizes.images(sizes.N, sizes.D // sizes.H)
    arguments = {"tokens": sizes.tokens(), "kept": kept, "metric": metric}
    return arguments | {"size": sizes.token_counts(), "return_info": True}
