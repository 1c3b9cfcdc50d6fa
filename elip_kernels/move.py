"""Selection and movement apart, for images whose tokens do not fit one program with their features.

    select   one program an image: kept positions, weights and output rows of its scores
    move     one program per (image, slice of D): tile by tile, each token to its output row

`reduce` does both at once where it can (`reduce.py`); a boundary that scores selects by a kernel of
its own (`score_reduce.py`). Tokens are read once and written once; prefix tokens are rows like any.
"""

from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import tl, triton
from elip_kernels.select import load_tile, select_and_weigh, store_selection, zero_rows


@triton.jit(do_not_specialize=["N", "K"])
def _select_kernel(
    scores_ptr, mask_ptr, kept_ptr, weights_ptr, slots_ptr, stride_sb, stride_mb, N, K,
    P: tl.constexpr, MERGE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr,
    EPSILON: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program an image; the N - P scores are given."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - P
    score = tl.load(scores_ptr + pid_b * stride_sb + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    is_real = mask_n
    if HAS_MASK:
        real = tl.load(mask_ptr + pid_b * stride_mb + P + offs_n, mask=mask_n, other=0)
        is_real = mask_n & (real != 0)
    is_kept, slot, weight = select_and_weigh(score, is_real, mask_n, K, MERGE, NORMALIZE, EPSILON)
    store_selection(
        kept_ptr, weights_ptr, slots_ptr, is_kept, slot, weight, offs_n, mask_n, pid_b, N, K, P
    )


@triton.jit(do_not_specialize=["N", "R"])
def _move_kernel(
    tokens_ptr, out_ptr, weights_ptr, slots_ptr, stride_tb, stride_tn, N, R, D,
    MERGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (image, slice of D); R rows are copied, row R is the merged one."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    tokens_ptr += pid_b * stride_tb
    out_ptr += pid_b * (R + MERGE) * D
    merged = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        slot = tl.load(slots_ptr + pid_b * N + offs_n, mask=mask_n, other=0)
        is_kept = mask_n & (slot < R)
        if MERGE:
            x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, mask_n, mask_d, 0)
            weight = tl.load(weights_ptr + pid_b * N + offs_n, mask=mask_n, other=0.0)
            share = zero_rows(x, weight != 0).to(tl.float32) * weight[:, None]
            merged += tl.sum(share, 0)
        else:
            x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, is_kept, mask_d, 0)
        tl.store(
            out_ptr + slot[:, None] * D + offs_d[None, :],
            x,
            mask=is_kept[:, None] & mask_d[None, :],
        )
    if MERGE:
        merged = merged.to(tokens_ptr.dtype.element_ty)
        tl.store(out_ptr + R * D + offs_d, merged, mask=mask_d)


def launch_select(
    scores: Tensor,
    mask: Tensor | None,
    selection: tuple[Tensor, Tensor, Tensor],
    num_prefix_tokens: int,
    **flags: bool | float,
) -> None:
    """Write kept, weights and slots of the scores (B, N-p), side by side as the mask (B, N) is.

    flags: MERGE, NORMALIZE and EPSILON of the kernel.
    """
    (B, candidates), (kept, weights, slots) = scores.shape, selection
    block_n, _, num_warps = launch.select(candidates, 1)
    _select_kernel[(B,)](
        *(scores, mask, kept, weights, slots, scores.stride(0)),
        *(0 if mask is None else mask.stride(0), slots.shape[1], kept.shape[1]),
        P=num_prefix_tokens,
        HAS_MASK=mask is not None,
        BLOCK_N=block_n,
        num_warps=num_warps,
        **launch.CODE,
        **flags,
    )


def launch_move(
    tokens: Tensor, out: Tensor, weights: Tensor, slots: Tensor, *, merge: bool
) -> None:
    """Write `out` (B, R, D) of the tokens (B, N, D), whose features lie side by side."""
    (B, N, D), R = tokens.shape, out.shape[1] - merge
    block_n, block_d, num_warps = launch.move(N, tokens.element_size())
    _move_kernel[(B, triton.cdiv(D, block_d))](
        *(tokens, out, weights, slots, *tokens.stride()[:2], N, R, D),
        MERGE=merge,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
        **launch.CODE,
    )
