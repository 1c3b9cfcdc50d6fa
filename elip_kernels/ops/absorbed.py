"""Argument checks and the scoring kernels that the absorbed ops share.

The score of a token is u_h . z_n. The query u is made from the CLS token alone
(`absorbed_query.py`). One program scores a tile of patches for all heads and stores the maximum and
the sum of exponentials of the tile. A later kernel combines the tiles of an image into softmax
rows. The scores of an image depend on its tokens only: they are bitwise equal for every batch size.
"""

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels._validate import (
    check_device,
    check_heads,
    check_scale,
    check_shape,
    check_tensor,
    check_tokens,
    message,
    plain_number,
)
from elip_kernels.ops.absorbed_query import QueryArguments
from elip_kernels.ops.fuse_text import check_guidance

STATS = ["totals_ptr", "shifts_ptr"]  # share a storage, so their alignment depends on the batch


def query_arguments(
    tokens: Tensor,
    cls: Tensor,
    eps: float,
    num_heads: int,
    scale: float | None,
    norm: dict[str, Tensor | None],
    matrices: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    *,
    least: int = 1,
    text: Tensor | None = None,
    fusion: float = 1,
    guidance_norm: str = "none",
) -> QueryArguments:
    """Check the arguments of an absorbed op, with N at least `least`; return those of the query."""
    check_tokens(tokens, least)
    B, _, D = tokens.shape
    check_tensor("cls", cls, "(B, D)", 2)
    check_shape("cls", cls, (B, D), "(B, D)")
    check_device("cls", cls, "tokens", tokens)
    eps = plain_number(eps)
    if not isinstance(eps, float):
        raise TypeError(message("eps", "a float, at least 0", eps))
    if not 0 <= eps < float("inf"):
        raise ValueError(message("eps", "a finite float, at least 0", eps))
    check_tensor("q_weight", matrices["q_weight"], "(H*d, D)", 2)
    width = matrices["q_weight"].shape[0]
    check_heads(num_heads, width)
    for group, shape, names in (
        (matrices, (width, D), "(H*d, D)"),
        (norm, (D,), "(D,)"),
        (biases, (width,), "(H*d,)"),
    ):
        for name, value in group.items():
            if value is not None or group is matrices:
                check_tensor(name, value, names, len(shape))
                check_shape(name, value, shape, names)
                check_device(name, value, "tokens", tokens)
    fusion = check_guidance(tokens, text, fusion, guidance_norm)
    if text is None and fusion != 1:
        remedy = "pass the text, or leave fusion out"
        raise ValueError(message("fusion", "1 without a text", fusion, remedy))
    scale = check_scale(scale, width // num_heads)
    projections = matrices["q_weight"], biases["q_bias"], matrices["k_weight"]
    tensors = (cls, text, *norm.values(), *projections)
    cls, text, gamma, beta, *projections = (t if t is None else t.detach() for t in tensors)
    match = guidance_norm == "match"
    return QueryArguments(
        *(cls, text, fusion, match, gamma, beta, eps), *projections, num_heads, scale
    )


@triton.jit
def patch_scores(
    tokens_ptr, query_ptr, pid_b, stride_tb, stride_tn, offs_n, N, D, H, eps,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return scores u_h . z [BLOCK_N, BLOCK_H], means and rstds [BLOCK_N] of patches, all fp32.

    `offs_n` counts the patches of an image from 0. u is centred, so the product uses x without
    its mean subtracted; afterwards mean * sum(u) removes the rounding error of the centring. For
    two-byte x, u has two rows a head, rounded and rest, whose products are added after the loop:
    two products a step into one accumulator would be miscompiled for Blackwell by Triton 3.6 to
    3.8 (triton issue 10821). Moments are computed from x - pivot, where the pivot is the mean of
    the first BLOCK_K features, so that little cancels. fp32 scores are computed from x - pivot as
    well; for fp16 the pivot is subtracted from the scores at every step.
    """
    ROWS: tl.constexpr = 2 if HAS_REST else 1
    tokens_ptr += pid_b * stride_tb
    query_ptr += pid_b * ROWS * H * D
    offs_u = tl.arange(0, ROWS * BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    score = tl.zeros([BLOCK_N, ROWS * BLOCK_H], tl.float32)
    pivot = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    sum_u = tl.zeros([ROWS * BLOCK_H], tl.float32)
    for k in range(0, D, BLOCK_K):
        mask_k = k + offs_k < D
        x = tl.load(
            tokens_ptr + (1 + offs_n)[:, None] * stride_tn + (k + offs_k)[None, :],
            mask=(offs_n < N - 1)[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        u = tl.load(
            query_ptr + offs_u[:, None] * D + (k + offs_k)[None, :],
            mask=(offs_u < ROWS * H)[:, None] & mask_k[None, :],
            other=0.0,
        )  # [ROWS * BLOCK_H, BLOCK_K]
        wide = x.to(tl.float32)
        pivot = tl.where(k == 0, tl.sum(wide, 1) / tl.minimum(D, BLOCK_K), pivot)
        shifted = tl.where(mask_k[None, :], wide - pivot[:, None], 0.0)
        total += tl.sum(shifted, 1)
        squares += tl.sum(shifted * shifted, 1)
        left = (wide if WIDEN else x) if HAS_REST else shifted
        right = u.to(tl.float32) if WIDEN else u
        score = tl.dot(left, tl.trans(right), score, input_precision=PRECISION)
        part_u = tl.sum(u.to(tl.float32), 1)
        sum_u += part_u
        if tokens_ptr.dtype.element_ty == tl.float16:
            score -= pivot[:, None] * part_u[None, :]
    if HAS_REST:
        score = tl.sum(tl.reshape(score, [BLOCK_N, BLOCK_H, ROWS]), 2)
        sum_u = tl.sum(tl.reshape(sum_u, [BLOCK_H, ROWS]), 1)
    from_pivot = total / D
    variance = squares / D - from_pivot * from_pivot
    eps = tl.cast(eps, tl.float32)
    rstd = 1.0 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)  # keeps NaN
    mean = from_pivot + pivot
    left = mean if tokens_ptr.dtype.element_ty == tl.bfloat16 else from_pivot
    score -= left[:, None] * sum_u[None, :]
    return score * rstd[:, None], mean, rstd


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=STATS)
def scores_kernel(
    tokens_ptr, query_ptr, scores_ptr, tops_ptr, totals_ptr, stride_tb, stride_tn, N, D, H, eps,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Score a tile of patches; store each head's maximum and sum. Grid: (image, tile)."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_t = tl.program_id(1)
    offs_n = pid_t * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    mask_n = offs_n < N - 1
    mask_h = offs_h < H
    score, _, _ = patch_scores(
        tokens_ptr, query_ptr, pid_b, stride_tb, stride_tn, offs_n, N, D, H, eps,
        HAS_REST, WIDEN, PRECISION, BLOCK_N, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    score = tl.where(mask_n[:, None], score, float("-inf"))
    top = tl.max(score, 0)
    offs_t = (pid_b * H + offs_h) * tl.num_programs(1) + pid_t
    tl.store(tops_ptr + offs_t, top, mask=mask_h)
    tl.store(totals_ptr + offs_t, tl.sum(tl.exp(score - top[None, :]), 0), mask=mask_h)
    tl.store(
        scores_ptr + (pid_b * H + offs_h)[None, :] * (N - 1) + offs_n[:, None],
        score,
        mask=mask_n[:, None] & mask_h[None, :],
    )


@triton.jit
def row_of_scores(
    scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, pid_b, first, N, H, T,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return the head mean of softmax rows from T tiles: patches [BLOCK_N] and CLS scalar."""
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T)
    mask_n = offs_n < N - 1
    mask_t = offs_t < T
    row = tl.zeros([BLOCK_N], tl.float32)
    cls_row = 0.0
    for h in range(0, H, BLOCK_H):
        offs_h = h + tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        head = pid_b * H + offs_h
        score = tl.load(
            scores_ptr + head[:, None] * (N - 1) + offs_n[None, :],
            mask=mask_h[:, None] & mask_n[None, :],
            other=float("-inf"),
        )  # [BLOCK_H, BLOCK_N]
        offs = head[:, None] * T + offs_t[None, :]
        mask = mask_h[:, None] & mask_t[None, :]
        tops = tl.load(tops_ptr + offs, mask=mask, other=float("-inf"))  # [BLOCK_H, BLOCK_T]
        totals = tl.load(totals_ptr + offs, mask=mask, other=0.0)
        cls_score = tl.load(cls_score_ptr + head, mask=mask_h, other=0.0)
        top = tl.maximum(tl.max(tops, 1), cls_score)
        cls_weight = tl.exp(cls_score - top)
        total = tl.sum(totals * tl.exp(tops - top[:, None]), 1) + cls_weight
        share = tl.where(mask_h, 1.0 / (total * H), 0.0)
        row += tl.sum(tl.exp(score - top[:, None]) * share[:, None], 0)
        cls_row += tl.sum(cls_weight * share, 0)
    return row, cls_row


@triton.jit(do_not_specialize=["N", "T"], do_not_specialize_on_alignment=STATS)
def _row_kernel(
    scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, out_ptr, N, H, T,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store BLOCK_N entries of a row from the scores of its tiles. Grid: (image, part of row)."""
    pid_b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    row, cls_row = row_of_scores(
        scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, pid_b, first, N, H, T,
        BLOCK_N, BLOCK_T, BLOCK_H,
    )  # fmt: skip
    offs_n = first + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + pid_b * N + 1 + offs_n, row, mask=offs_n < N - 1)
    if first == 0:
        tl.store(out_ptr + pid_b * N, cls_row)


def score_tiles(tokens: Tensor, query: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `scores_kernel`; return scores (B, H, N-1), tops and totals (B, H, T) of T tiles.

    The query u is that of `launch_query`; all others are fp32.
    """
    (B, N, D), H = tokens.shape, query.shape[1]
    settings = launch.score_tiles(H, tokens)
    T = launch.cdiv(N - 1, settings["BLOCK_N"])
    scores = tokens.new_empty(B, H, N - 1, dtype=torch.float32)
    tops, totals = scores.new_empty(2, B, H, T)
    launch.run(
        wrap_triton(scores_kernel),
        (B, T),
        *(tokens, query, scores, tops, totals, *tokens.stride()[:2], N, D, H, eps),
        **settings,
    )
    return scores, tops, totals


def launch_row(
    scores: Tensor, tops: Tensor, totals: Tensor, cls_score: Tensor, out: Tensor
) -> None:
    """Write the row (B, N) of each image from the scores of its tiles."""
    (B, N), (_, H, T) = out.shape, tops.shape
    block_n, block_t, num_warps = launch.row(N - 1, T)
    launch.run(
        wrap_triton(_row_kernel),
        (B, max(1, launch.cdiv(N - 1, block_n))),
        *(scores, tops, totals, cls_score, out, N, H, T),
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        BLOCK_H=launch.heads_a_step(block_n, block_t, num_warps),
        num_warps=num_warps,
    )
