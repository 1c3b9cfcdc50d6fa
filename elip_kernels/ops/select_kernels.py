"""Triton kernels that only select: kept positions, weights and output rows from scores.

    _select_kernel  grid (image): the scores of an image in registers
    _stream_kernel  grid (image): the scores tile by tile; four passes of eight bits find the K-th
                    largest key, one pass sums what is merged, one pass writes

Both select the same tokens. A score is read from memory once, and from the cache in later passes.
"""

from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels.ops.select_device import (
    EPSILON,
    SCALE,
    kept_among,
    order_key,
    select_and_weigh,
    store_prefix,
    store_selection,
)

DIGITS = tl.constexpr(256)


@triton.jit
def _load_scores(
    scores_ptr, real_ptr, first, N, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Load candidates from `first` on; return offsets, mask, is_real and fp32 scores."""
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    score = tl.load(scores_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    is_real = mask_n
    if HAS_MASK:
        is_real = mask_n & (tl.load(real_ptr + offs_n, mask=mask_n, other=0) != 0)
    return offs_n, mask_n, is_real, score


@triton.jit(do_not_specialize=["N", "K"])
def _select_kernel(
    scores_ptr, real_ptr, kept_ptr, weights_ptr, slots_ptr, stride_sb, stride_rb, N, K,
    P: tl.constexpr, MERGE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Select among N candidates after P prefix tokens, in registers. Grid: (image)."""
    pid_b = tl.program_id(0).to(tl.int64)
    all_n = P + N
    scores_ptr += pid_b * stride_sb
    if HAS_MASK:
        real_ptr += pid_b * stride_rb
    offs_n, mask_n, is_real, score = _load_scores(scores_ptr, real_ptr, 0, N, HAS_MASK, BLOCK_N)
    is_kept, slot, weight = select_and_weigh(score, is_real, mask_n, K, MERGE)
    store_selection(
        kept_ptr, weights_ptr, slots_ptr, is_kept, slot, weight, offs_n, mask_n, pid_b, all_n, K, P
    )
    store_prefix(weights_ptr, slots_ptr, pid_b, all_n, P)


@triton.jit
def _kth_largest(
    scores_ptr, real_ptr, N, K, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the K-th largest key, how many keys equal it, and how many of those are kept."""
    bins = tl.arange(0, 2 * DIGITS)  # the upper half counts keys that no longer match
    threshold = tl.zeros([], tl.uint32)
    quota, equal = K, K
    for digit in tl.static_range(4):
        counts = tl.zeros([2 * DIGITS], tl.int32)
        for first in range(0, N, BLOCK_N):
            _, mask_n, is_real, score = _load_scores(
                scores_ptr, real_ptr, first, N, HAS_MASK, BLOCK_N
            )
            key = order_key(score, is_real, mask_n)
            is_open = mask_n
            if digit > 0:
                is_open = mask_n & ((key >> (32 - 8 * digit)) == threshold)
            value = ((key >> (24 - 8 * digit)) & (DIGITS - 1)).to(tl.int32)
            counts += tl.histogram(tl.where(is_open, value, DIGITS), 2 * DIGITS)
        counts = tl.where(bins < DIGITS, counts, 0)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where((bins < DIGITS) & (at_least >= quota), bins, 0), 0)
        quota -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        equal = tl.sum(tl.where(bins == digit, counts, 0), 0)
        threshold = (threshold << 8) | digit.to(tl.uint32)
    return threshold, equal, quota


@triton.jit
def _sum_of_merged(
    scores_ptr, real_ptr, threshold, equal, quota, N,
    HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return SCALE times the sum of the merged scores; those of the threshold share one value."""
    below = 0.0
    beside = 0.0
    for first in range(0, N, BLOCK_N):
        _, mask_n, is_real, score = _load_scores(scores_ptr, real_ptr, first, N, HAS_MASK, BLOCK_N)
        key = order_key(score, is_real, mask_n)
        value = tl.where(is_real & (tl.abs(score) < float("inf")), score * SCALE, 0.0)
        below += tl.sum(tl.where(key < threshold, value, 0.0), 0)
        beside += tl.sum(tl.where(key == threshold, value, 0.0), 0)
    return below + beside * ((equal - quota).to(tl.float32) / equal)


@triton.jit(do_not_specialize=["N", "K"])
def _stream_kernel(
    scores_ptr, real_ptr, kept_ptr, weights_ptr, slots_ptr, stride_sb, stride_rb, N, K,
    P: tl.constexpr, MERGE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Select among N candidates, BLOCK_N at a time. Grid: (image)."""
    pid_b = tl.program_id(0).to(tl.int64)
    all_n = P + N
    scores_ptr += pid_b * stride_sb
    if HAS_MASK:
        real_ptr += pid_b * stride_rb
    threshold, equal, quota = _kth_largest(scores_ptr, real_ptr, N, K, HAS_MASK, BLOCK_N)
    total = 1.0
    if MERGE:
        total = EPSILON * SCALE + _sum_of_merged(
            scores_ptr, real_ptr, threshold, equal, quota, N, HAS_MASK, BLOCK_N
        )
    above_before = 0
    equal_before = 0
    for first in range(0, N, BLOCK_N):
        offs_n, mask_n, is_real, score = _load_scores(
            scores_ptr, real_ptr, first, N, HAS_MASK, BLOCK_N
        )
        key = order_key(score, is_real, mask_n)
        is_kept, slot = kept_among(key, threshold, above_before, equal_before, quota, K)
        above_before += tl.sum((key > threshold).to(tl.int32), 0)
        equal_before += tl.sum((key == threshold).to(tl.int32), 0)
        weight = tl.zeros_like(score)
        if MERGE:
            is_merged = is_real & (tl.abs(score) < float("inf")) & (is_kept == 0)
            weight = tl.where(is_merged, score, 0.0) / total * SCALE
        store_selection(
            kept_ptr, weights_ptr, slots_ptr,
            is_kept, slot, weight, offs_n, mask_n, pid_b, all_n, K, P,
        )  # fmt: skip
    store_prefix(weights_ptr, slots_ptr, pid_b, all_n, P)


def launch_select(
    scores: Tensor,
    real: Tensor | None,
    kept: Tensor,
    weights: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    num_prefix_tokens: int,
    merge: bool = False,
) -> None:
    """Write `kept` (B, K) from scores (B, N) and, if given, `weights` and `slots` (B, p+N)."""
    B, N = scores.shape
    kernel, candidates = wrap_triton(_select_kernel), N
    if N > launch.MAX_SELECTED:
        kernel, candidates = wrap_triton(_stream_kernel), launch.TILE
    block_n, _, num_warps = launch.select(candidates, 1)
    launch.run(
        kernel,
        (B,),
        *(scores, real, kept, weights, slots, scores.stride(0)),
        *(0 if real is None else real.stride(0), N, kept.shape[1]),
        P=num_prefix_tokens,
        MERGE=merge,
        HAS_MASK=real is not None,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
