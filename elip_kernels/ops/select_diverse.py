"""Select K different tokens: greedy max-min selection by cosine distance ("farthest point").

    c_mn = cosine of tokens m and n                                             (B, N, N)
    s_1  = arg min_n max_{m != n} c_mn, the token whose nearest other token is farthest, or given
    s_t  = arg min_n max_{i < t} c_n,s_i over the tokens that are not selected  (B, K) int64

Of the tokens whose key is within TIE of the smallest, the lowest index is selected, so that
rounding does not select between equal tokens. A token without direction (zero, or not finite)
comes after all others, padding comes last, and no distance to either counts. The cosines are
computed once, in tiles; the selection of an image is one program that reads a row of them per
token. No atomics are used and the tiles of an image do not depend on the batch, so results are
bitwise reproducible. Products and cosines are fp32 (fp64 for fp64 tokens). There is no gradient:
positions are integers.
Source: DivPrune (arXiv 2503.02175), from the paper.
"""

import math

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import is_interpreted, tl, triton, wrap_triton
from elip_kernels._validate import (
    check_dense,
    check_device,
    check_flags,
    check_keep,
    check_mask,
    check_range,
    check_shape,
    check_tokens,
    message,
)
from elip_kernels.ops.bipartite import unit_rows
from elip_kernels.ops.bipartite_kernels import SMALLEST_SQUARE, inverse_norm, tile_products

TIE = 1e-5
"""Cosines that differ by at most this are a tie. Rounding of a cosine in fp32 is below 1e-6."""
TIED = tl.constexpr(TIE)
# Keys in place of a cosine, which is at most 1. The token with the smallest key is selected.
KEYS = (-2.0, 2.0, 3.0, 4.0, 5.0)
NO_COSINE_KEY, NO_DIRECTION_KEY, PADDING_KEY, SELECTED_KEY, BEYOND_KEY = KEYS
NO_COSINE, NO_DIRECTION, PADDING, SELECTED, BEYOND = (tl.constexpr(key) for key in KEYS)


def select_diverse(
    tokens: Tensor,
    keep: int | float,
    *,
    mask: Tensor | None = None,
    first: Tensor | None = None,
    selection_order: bool = False,
) -> Tensor:
    """Return the positions of `keep` tokens that differ most from each other (DivPrune).

    The first token is the one whose most similar other token is least similar. Each further token
    has the smallest largest cosine with the selected ones. Cosines within 1e-5 of the best one are
    a tie, which goes to the lower index. Example::

        kept = elip_kernels.select_diverse(tokens, 0.25)  # (B, 576, D) -> (B, 144)
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))

    In `selection_order` the first k positions are those of `keep=k`, so one call with the largest
    count selects for images that keep different counts. Source: DivPrune (arXiv 2503.02175).

    Args:
        tokens: (B, N, D), all of them candidates; fp32, bf16, fp16 or fp64.
        keep: int, a count K; or float, a ratio r in (0, 1] of N, max(1, int(r * N)).
        mask: (B, N) bool, True = real. Padding comes last.
        first: (B,) int64, the position of the first token, such as the one most similar to a
            question. Values are checked on the CPU, outside of graphs.
        selection_order: return positions in the order of their selection instead of image order.

    Returns:
        kept (B, K) int64, different positions from 0 to N-1, without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    keep = check_selection(tokens, keep, mask, selection_order)
    if first is not None:
        _check_first(first, tokens)
    order = _diverse_op(tokens.detach(), mask, first, keep)
    return order if selection_order else in_image_order(order, mask)


def check_selection(
    tokens: Tensor, keep: int | float, mask: Tensor | None, selection_order: bool
) -> int:
    """Check the arguments of a selection of `tokens`; return the count."""
    check_tokens(tokens)
    B, N, _ = tokens.shape
    keep = check_keep(keep, N)
    check_mask(mask, (B, N), "tokens", tokens)
    check_flags(selection_order=selection_order)
    return keep


def _check_first(first: Tensor, tokens: Tensor) -> None:
    B, N, _ = tokens.shape
    check_dense("first", first, "positions", "(B,) int64")
    if first.dtype != torch.int64:
        raise TypeError(message("first", "positions (B,) int64", first, "cast it: first.long()"))
    check_shape("first", first, (B,), "(B,)")
    check_device("first", first, "tokens", tokens)
    check_range("first", first, 0, N - 1)


def in_image_order(order: Tensor, mask: Tensor | None) -> Tensor:
    """Return positions (B, K) in ascending order, padding last."""
    if mask is None:
        return order.sort(1).values
    N = mask.shape[1]
    return (order + N * ~mask.gather(1, order)).sort(1).values % N


def first_true(is_best: Tensor) -> Tensor:
    """Return the position (B,) of the first true value of each row (B, N)."""
    return is_best.int().argmax(1)


def first_smallest(key: Tensor) -> Tensor:
    """Return the lowest position (B,) whose key (B, N) is within TIE of the smallest."""
    return first_true(key <= key.amin(1, keepdim=True) + TIE)


def diverse_reference(
    tokens: Tensor, real: Tensor | None, first: Tensor | None, keep: int
) -> Tensor:
    """Compute the selection in PyTorch; return positions (B, K) in the order of selection."""
    (B, N, _), unit = tokens.shape, unit_rows(tokens)
    if real is not None:
        unit = unit.masked_fill(~real[..., None], float("nan"))
    cosine, has_none = unit @ unit.mT, unit[..., 0].isnan()
    level = torch.where(has_none, NO_DIRECTION_KEY, NO_COSINE_KEY).to(cosine.dtype)
    if real is not None:
        level = level.masked_fill(~real, PADDING_KEY)
    cosine = torch.where(cosine.isnan(), level[:, None], cosine.clamp(max=1.0))  # (B, N, N)
    is_own = torch.eye(N, dtype=torch.bool, device=tokens.device)
    if first is None:
        first = first_smallest(cosine.masked_fill_(is_own, NO_COSINE_KEY).amax(1))
    cosine = cosine.masked_fill_(is_own, SELECTED_KEY)
    order, key = [first.clamp(0, N - 1)], level.new_full((), NO_COSINE_KEY)
    rows, start = cosine.view(B * N, N), torch.arange(0, B * N, N, device=tokens.device)
    for _ in range(1, keep):
        key = torch.maximum(key, rows.index_select(0, order[-1] + start))
        order.append(first_smallest(key))
    return torch.stack(order, 1)


@triton.jit(do_not_specialize=["N"])
def _cosines_kernel(
    tokens_ptr, real_ptr, cosine_ptr, nearest_ptr, stride_tb, stride_tn, stride_rb, N, D,
    SMALLEST_SQUARE: tl.constexpr, HAS_NEAREST: tl.constexpr, HAS_MASK: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store a tile of cosines, and the largest of each column with another token of the tile.

    A cosine is NaN if a token has no direction or its row is padding.
    Grid: (image, BLOCK_A tokens, BLOCK_B tokens).
    """
    pid_b = tl.program_id(0).to(tl.int64)
    offs_a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_a = offs_a < N
    mask_b = offs_b < N
    product, square_a, square_b = tile_products(
        tokens_ptr + pid_b * stride_tb, stride_tn, offs_a, offs_b, mask_a, mask_b, D,
        WIDEN, BLOCK_A, BLOCK_B, BLOCK_C,
    )  # fmt: skip
    scale_a = inverse_norm(square_a, SMALLEST_SQUARE)
    if HAS_MASK:
        real = tl.load(real_ptr + pid_b * stride_rb + offs_a, mask=mask_a, other=0)
        scale_a = tl.where(real != 0, scale_a, float("nan"))
    cosine = product * inverse_norm(square_b, SMALLEST_SQUARE)[None, :]
    cosine = cosine * scale_a[:, None]  # [BLOCK_A, BLOCK_B]
    if HAS_NEAREST:
        is_own = offs_a[:, None] == offs_b[None, :]
        other = tl.where(is_own, NO_COSINE, cosine)
        nearest = tl.max(tl.where(other == other, other, NO_COSINE), 0)
        part = pid_b * tl.num_programs(1) + tl.program_id(1)
        tl.store(nearest_ptr + part * N + offs_b, nearest, mask=mask_b)
    mask = mask_a[:, None] & mask_b[None, :]
    tl.store(cosine_ptr + (pid_b * N + offs_a)[:, None] * N + offs_b[None, :], cosine, mask=mask)


@triton.jit
def load_level(cosine_ptr, real_ptr, first, offs_n, N, HAS_MASK: tl.constexpr):
    """Return NO_COSINE for candidates [BLOCK_N], by the diagonal, and the key of other tokens."""
    mask_n = offs_n < N
    own = tl.load(cosine_ptr + offs_n * (N + 1), mask=mask_n, other=1.0)
    level = tl.where(own == own, NO_COSINE, NO_DIRECTION)
    if HAS_MASK:
        real = tl.load(real_ptr + first + offs_n, mask=mask_n, other=1)
        level = tl.where(real != 0, level, PADDING)
    return tl.where(mask_n, level, BEYOND)


@triton.jit
def lowest_offset(is_best, offs_n):
    """Return the lowest offset whose flag [BLOCK_N] is true."""
    return tl.min(tl.where(is_best, offs_n, offs_n.shape[0]), 0)


@triton.jit(do_not_specialize=["N", "K", "T"])
def _diverse_kernel(
    cosine_ptr, nearest_ptr, first_ptr, real_ptr, order_ptr, stride_rb, N, K, T,
    HAS_FIRST: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Select K tokens of an image, one row of cosines after the other. Grid: (image)."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    cosine_ptr += pid_b * N * N
    level = load_level(cosine_ptr, real_ptr, pid_b * stride_rb, offs_n, N, HAS_MASK)
    if HAS_FIRST:
        last = tl.minimum(tl.maximum(tl.load(first_ptr + pid_b), 0), N - 1).to(tl.int32)
    else:
        key = level
        for start_t in range(0, T, BLOCK_T):
            offs_t = start_t + tl.arange(0, BLOCK_T)
            parts = tl.load(
                nearest_ptr + (pid_b * T + offs_t)[:, None] * N + offs_n[None, :],
                mask=(offs_t < T)[:, None] & mask_n[None, :],
                other=NO_COSINE,
            )  # [BLOCK_T, BLOCK_N]
            key = tl.maximum(key, tl.max(parts, 0))
        last = lowest_offset(key <= tl.min(key, 0) + TIED, offs_n)
    tl.store(order_ptr + pid_b * K, last.to(tl.int64))
    key = level
    for t in range(1, K):
        row = tl.load(cosine_ptr + last * N + offs_n, mask=mask_n, other=0.0)
        row = tl.where(row == row, tl.minimum(row, 1.0), NO_COSINE)
        key = tl.where(offs_n == last, SELECTED, tl.maximum(key, row))
        last = lowest_offset(key <= tl.min(key, 0) + TIED, offs_n)
        tl.store(order_ptr + pid_b * K + t, last.to(tl.int64))


def launch_cosines(
    tokens: Tensor, real: Tensor | None = None, nearest: Tensor | None = None
) -> Tensor:
    """Return cosines (B, N, N); write `nearest` (B, T, N), the largest of each tile, if given."""
    B, N, D = tokens.shape
    tokens = launch.addressable(tokens)
    settings = launch.bipartite_match(D, tokens.element_size())
    cosine = tokens.new_empty(B, N, N, dtype=torch.float32)
    grid = B, launch.cdiv(N, settings["BLOCK_A"]), launch.cdiv(N, settings["BLOCK_B"])
    launch.run(
        wrap_triton(_cosines_kernel),
        grid,
        *(tokens, real, cosine, nearest, tokens.stride(0), tokens.stride(1)),
        *(0 if real is None else real.stride(0), N, D),
        SMALLEST_SQUARE=SMALLEST_SQUARE,
        HAS_NEAREST=nearest is not None,
        HAS_MASK=real is not None,
        WIDEN=is_interpreted(),
        **settings,
    )
    return cosine


def _diverse(tokens: Tensor, real: Tensor | None, first: Tensor | None, keep: int) -> Tensor:
    """Allocate and launch: cosines of all pairs, then the selection."""
    B, N, D = tokens.shape
    order = tokens.new_empty(B, keep, dtype=torch.int64)
    (real,) = launch.dense_rows(real)
    T = launch.cdiv(N, launch.bipartite_match(D, tokens.element_size())["BLOCK_A"])
    nearest = tokens.new_empty(B, T, N, dtype=torch.float32) if first is None else None
    cosine = launch_cosines(tokens, real, nearest)
    launch.run(
        wrap_triton(_diverse_kernel),
        (B,),
        *(cosine, nearest, None if first is None else first.contiguous(), real, order),
        *(0 if real is None else real.stride(0), N, keep, T),
        HAS_FIRST=first is not None,
        HAS_MASK=real is not None,
        **launch.greedy_selection(N),
    )
    return order


def _flops(tokens_shape, *args, **kwargs) -> int:
    """Return a multiply and an add for each channel of each pair of tokens."""
    B, N, D = tokens_shape
    return 2 * B * N * N * D


_diverse_op = Operator(
    "select_diverse",
    diverse_reference,
    launcher=_diverse,
    unsupported=lambda tokens, *_: launch.unsupported(
        tokens, candidates=tokens.shape[1], most=launch.MAX_SELECTED
    ),
    fake=lambda tokens, real, first, keep: tokens.new_empty(
        tokens.shape[0], keep, dtype=torch.int64
    ),
    flops=_flops,
)


def separated_tokens(sizes: Sizes) -> Tensor:
    """Return tokens whose cosines are exact in every dtype, so that rounding does not select.

    The length of each token is a power of two: 4^n of its numbers are 1 or -1, the others 0.
    """
    tokens = sizes.tokens().sign()
    tokens[..., 4 ** int(math.log(sizes.D, 4)) :] = 0
    return tokens


@example_of(select_diverse)
def _example(sizes: Sizes) -> Arguments:
    return {"tokens": separated_tokens(sizes), "keep": sizes.K, "selection_order": True}
