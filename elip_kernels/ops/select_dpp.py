"""Select K tokens that are relevant and different: greedy MAP of a determinantal point process.

    L   = diag(q) S diag(q), S the cosines of the tokens (N, N), q the relevance (N)
    s_t = arg max_n det L[{s_1 .. s_t-1, n}] over the tokens that are not selected  (B, K) int64

The gain of token n is q_n^2 r_n. At first r_n = S_nn = 1. Each step subtracts the square of a
column of the Cholesky factor of S (Chen et al., arXiv 1709.05135, algorithm 1). With j the selected
token:

    e_n = (S_jn - sum_i c_in c_ij) / sqrt(r_j), the sum over the columns c_i of earlier steps
    r_n <- r_n - e_n^2

A token with r_n <= SPANNED is nearly a combination of the selected ones: its gain counts as 0. So
does that of a token without direction (zero, or not finite), or with NaN as relevance. Of the
tokens whose gain, with r_n + TIE in place of r_n, reaches the largest gain, the lowest index is
selected, so that rounding does not select between equal tokens. Padding comes last. The cosines
are computed once, in tiles; the selection of an image is one program. No atomics are used and the
tiles of an image do not depend on the batch, so results are bitwise reproducible. Sums are fp32
(fp64 for fp64 inputs). There is no gradient: positions are integers.
Source: CDPruner (arXiv 2506.10967).
"""

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels._validate import check_device, check_shape, check_tensor
from elip_kernels.ops.bipartite import unit_rows
from elip_kernels.ops.gather_ops import accumulator
from elip_kernels.ops.select_diverse import (
    NO_COSINE,
    PADDING,
    PADDING_KEY,
    SELECTED,
    SELECTED_KEY,
    TIE,
    TIED,
    check_selection,
    first_true,
    in_image_order,
    launch_cosines,
    load_level,
    lowest_offset,
    separated_tokens,
)

LEAST_REST = 1e-5  # rounding of r_n in fp32 is at most a few 1e-6
SPANNED = tl.constexpr(LEAST_REST)


def select_dpp(
    tokens: Tensor,
    keep: int | float,
    *,
    relevance: Tensor | None = None,
    mask: Tensor | None = None,
    selection_order: bool = False,
) -> Tensor:
    """Return the positions of `keep` tokens with a large determinant of their kernel (CDPruner).

    The kernel is the cosine of two tokens times the relevance of both. Each step selects the token
    that increases the determinant most: one that is relevant and not a combination of the selected
    ones. Example::

        kept = elip_kernels.select_dpp(tokens, 64, relevance=relevance)  # (B, 576, D) -> (B, 64)

    In `selection_order` the first k positions are those of `keep=k`, so one call with the largest
    count selects for images that keep different counts. Without relevance all tokens have the same
    gain at first, so the first one is token 0. When no token increases the determinant any more,
    the rest is filled in image order. Tokens are a tie, which goes to the lower index, if a change
    of 1e-5 in r, the share of a token outside of the selected ones, would make their gains equal.
    Source: CDPruner (arXiv 2506.10967).

    Args:
        tokens: (B, N, D), all of them candidates; fp32, bf16, fp16 or fp64.
        keep: int, a count K; or float, a ratio r in (0, 1] of N, max(1, int(r * N)).
        relevance: (B, N), fp32, bf16, fp16 or fp64; None means 1 for each. Only its absolute value
            counts, and a common factor has no effect.
        mask: (B, N) bool, True = real. Padding comes last.
        selection_order: return positions in the order of their selection instead of image order.

    Returns:
        kept (B, K) int64, different positions from 0 to N-1, without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    keep = check_selection(tokens, keep, mask, selection_order)
    if relevance is not None:
        check_tensor("relevance", relevance, "(B, N)", 2)
        check_shape("relevance", relevance, tuple(tokens.shape[:2]), "(B, N)")
        check_device("relevance", relevance, "tokens", tokens)
        relevance = relevance.detach()
    order = _dpp_op(tokens.detach(), relevance, mask, keep)
    return order if selection_order else in_image_order(order, mask)


def dpp_reference(
    tokens: Tensor, relevance: Tensor | None, real: Tensor | None, keep: int
) -> Tensor:
    """Compute the selection in PyTorch; return positions (B, K) in the order of selection."""
    (B, N, _), unit = tokens.shape, unit_rows(tokens)
    cosine = (unit @ unit.mT).nan_to_num_(0.0)  # (B, N, N)
    rest = cosine.diagonal(dim1=1, dim2=2)
    whole = rest.masked_fill(rest == 0.0, 1.0)  # 1, up to the rounding of the token's norm
    weight = torch.ones_like(rest)
    if relevance is not None:
        weight = relevance.to(accumulator(tokens, relevance)).abs()
        weight = weight.masked_fill(weight.isnan(), 0.0)
    least = torch.zeros_like(weight)  # the gain of a combination, and below it of other tokens
    if real is not None:
        rest, least = rest.masked_fill(~real, 0.0), least.masked_fill(~real, -PADDING_KEY)
    rows, start = cosine.view(B * N, N), torch.arange(0, B * N, N, device=tokens.device)
    factor, order = cosine.new_zeros(B, keep, N), []
    for t in range(keep):
        gain, most = (
            torch.where(rest > LEAST_REST, weight * (share / whole).sqrt(), least)
            for share in (rest, rest + TIE)
        )
        best = first_true(most >= gain.amax(1, keepdim=True))[:, None]
        order.append(best)
        column = rows.index_select(0, best[:, 0] + start)
        if t > 0:
            known = factor[:, :t]
            own = known.gather(2, best[:, None].expand(B, t, 1))
            column = column - (own.mT @ known)[:, 0]
        pivot = rest.gather(1, best)
        column = column * torch.where(pivot > LEAST_REST, pivot.rsqrt(), 0.0)
        factor[:, t], rest = column, torch.addcmul(rest, column, column, value=-1.0)
        least = least.scatter(1, best, -SELECTED_KEY)
    return torch.cat(order, 1)


@triton.jit(do_not_specialize=["N", "K"])
def _dpp_kernel(
    cosine_ptr, relevance_ptr, real_ptr, factor_ptr, order_ptr, stride_qb, stride_rb, N, K,
    HAS_RELEVANCE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Select K tokens of an image and store the factor, row by row. Grid: (image)."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    cosine_ptr += pid_b * N * N
    factor_ptr += pid_b * K * N
    level = load_level(cosine_ptr, real_ptr, pid_b * stride_rb, offs_n, N, HAS_MASK)
    whole = tl.load(cosine_ptr + offs_n * (N + 1), mask=mask_n, other=1.0)  # 1, up to rounding
    rest = tl.where(level == NO_COSINE, whole, 0.0)  # [BLOCK_N]
    weight = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_RELEVANCE:
        q = tl.load(relevance_ptr + pid_b * stride_qb + offs_n, mask=mask_n, other=0.0)
        weight = tl.abs(q.to(tl.float32))
        weight = tl.where(weight == weight, weight, 0.0)
    least = tl.where(level >= PADDING, -level, 0.0)
    for t in range(0, K):
        share = tl.maximum(rest, 0.0)
        gain = tl.where(rest > SPANNED, weight * tl.sqrt(share / whole), least)
        most = tl.where(rest > SPANNED, weight * tl.sqrt((share + TIED) / whole), least)
        best = lowest_offset(most >= tl.max(gain, 0), offs_n)
        tl.store(order_ptr + pid_b * K + t, best.to(tl.int64))
        row = tl.load(cosine_ptr + best * N + offs_n, mask=mask_n, other=0.0)
        explained = tl.zeros([BLOCK_N], tl.float32)
        for start_i in range(0, t, BLOCK_T):
            offs_i = start_i + tl.arange(0, BLOCK_T)
            own = tl.load(factor_ptr + offs_i * N + best, mask=offs_i < t, other=0.0)
            known = tl.load(
                factor_ptr + offs_i[:, None] * N + offs_n[None, :],
                mask=(offs_i < t)[:, None] & mask_n[None, :],
                other=0.0,
            )  # [BLOCK_T, BLOCK_N]
            explained += tl.sum(own[:, None] * known, 0)
        is_best = offs_n == best
        pivot = tl.sum(tl.where(is_best, rest, 0.0), 0)
        scale = tl.where(pivot > SPANNED, tl.rsqrt(tl.maximum(pivot, SPANNED)), 0.0)
        column = (tl.where(row == row, row, 0.0) - explained) * scale
        tl.store(factor_ptr + t * N + offs_n, column, mask=mask_n)
        tl.debug_barrier()  # other threads read this row in the next step
        rest -= column * column
        least = tl.where(is_best, -SELECTED, least)


def _dpp(tokens: Tensor, relevance: Tensor | None, real: Tensor | None, keep: int) -> Tensor:
    """Allocate and launch: cosines of all pairs, then the selection."""
    B, N, _ = tokens.shape
    order = tokens.new_empty(B, keep, dtype=torch.int64)
    real, relevance = launch.dense_rows(real, relevance)
    cosine = launch_cosines(tokens)
    factor = cosine.new_empty(B, keep, N)
    launch.run(
        wrap_triton(_dpp_kernel),
        (B,),
        *(cosine, relevance, real, factor, order),
        *(0 if t is None else t.stride(0) for t in (relevance, real)),
        *(N, keep),
        HAS_RELEVANCE=relevance is not None,
        HAS_MASK=real is not None,
        **launch.greedy_selection(N),
    )
    return order


def _flops(tokens_shape, relevance_shape, real_shape, keep, **kwargs) -> int:
    """Return two operations for each channel of each pair, and for each two entries of a column."""
    B, N, D = tokens_shape
    return 2 * B * N * N * D + B * N * keep * (keep - 1)


_dpp_op = Operator(
    "select_dpp",
    dpp_reference,
    launcher=_dpp,
    unsupported=lambda tokens, relevance, *_: launch.unsupported(
        *(tokens, *(() if relevance is None else (relevance,))),
        candidates=tokens.shape[1],
        most=launch.MAX_SELECTED,
    ),
    fake=lambda tokens, relevance, real, keep: tokens.new_empty(
        tokens.shape[0], keep, dtype=torch.int64
    ),
    flops=_flops,
)


@example_of(select_dpp)
def _example(sizes: Sizes) -> Arguments:
    relevance = 1.1 ** -torch.stack([torch.randperm(sizes.N) for _ in range(sizes.B)]).float()
    arguments = {"tokens": separated_tokens(sizes), "keep": sizes.K, "relevance": relevance}
    return arguments | {"selection_order": True}
