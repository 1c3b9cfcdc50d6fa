"""Triton kernels that merge tokens by their slots, for `bipartite.py` and `merge_nearest.py`.

    merge_fwd  grid (image, 16 tokens and rows): a stable counting sort -> tokens in the order of
               their rows, the start of each row in this order, and its size
               grid (image, 16 output rows, slice of D): each row gathers its tokens, 16 at a time
               while it has that many; no atomics
    merge_bwd  grid (image, 32 tokens, slice of D): each token gathers its row

A row that is out of range is not read or written: its tokens have no gradient.

Traffic: `merge_fwd` reads each token once. Every tile of tokens reads all slots and sizes of its
image (from L2 after the first).
"""

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import tl, triton, wrap_triton

LAST_SLOT = tl.constexpr(2**31 - 1)  # after every row


@triton.jit(do_not_specialize=["N", "R"])
def _order_kernel(
    size_ptr, slots_ptr, order_ptr, starts_ptr, out_size_ptr, N, R,
    HAS_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sort tokens stably by row; store row starts and sizes. Grid: (image, BLOCK_N tokens)."""
    pid_b = tl.program_id(0).to(tl.int64)
    slots_ptr += pid_b * N
    if HAS_SIZE:
        size_ptr += pid_b * N
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # tokens, and rows
    mask_n = offs_n < N
    mask_r = offs_n < R
    slot = tl.minimum(tl.load(slots_ptr + offs_n, mask=mask_n, other=0), R)
    place = tl.zeros([BLOCK_N], tl.int32)
    start = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, N, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        other = tl.minimum(tl.load(slots_ptr + offs_m, mask=mask_m, other=0), R)
        other = tl.where(mask_m, other, LAST_SLOT)[:, None]
        size = tl.full([BLOCK_M], 1.0, tl.float32)
        if HAS_SIZE:
            size = tl.load(size_ptr + offs_m, mask=mask_m, other=0.0)
        is_earlier = (offs_m[:, None] < offs_n[None, :]).to(tl.int32)  # [BLOCK_M, BLOCK_N]
        place += tl.sum((other < slot[None, :] + is_earlier).to(tl.int32), 0)
        start += tl.sum((other < offs_n[None, :]).to(tl.int32), 0)
        total += tl.sum(tl.where(other == offs_n[None, :], size[:, None], 0.0), 0)
    tl.store(order_ptr + pid_b * N + place, offs_n, mask=mask_n)
    tl.store(starts_ptr + pid_b * R + offs_n, start, mask=mask_r)
    tl.store(out_size_ptr + pid_b * R + offs_n, total, mask=mask_r)


@triton.jit
def _load_shares(
    tokens_ptr, size_ptr, stride_tn, token, divisor, offs_d, mask_d, HAS_SIZE: tl.constexpr
):  # fmt: skip
    """Return w x [BLOCK_R, BLOCK_D] in fp32, w = size / divisor; 0 where token is -1."""
    is_source = token >= 0
    size = tl.where(is_source, 1.0, 0.0)
    if HAS_SIZE:
        size = tl.load(size_ptr + token, mask=is_source, other=0.0)
    x = tl.load(
        tokens_ptr + token[:, None] * stride_tn + offs_d[None, :],
        mask=is_source[:, None] & mask_d[None, :],
        other=0.0,
    )  # [BLOCK_R, BLOCK_D]
    return x.to(tl.float32) * tl.div_rn(size, divisor)[:, None]


@triton.jit(do_not_specialize=["N", "R"])
def _merge_fwd_kernel(
    tokens_ptr, size_ptr, order_ptr, starts_ptr, out_size_ptr, out_ptr, stride_tb, stride_tn,
    N, R, D, HAS_SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gather the tokens of each output row. Grid: (image, BLOCK_R rows, slice of D).

    A full round gathers BLOCK_R tokens of one row, while it has that many; the other rounds
    gather one token of every row. T tokens take at most T // BLOCK_R + BLOCK_R - 1 rounds,
    however many of them share a row.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    tokens_ptr += pid_b * stride_tb
    order_ptr += pid_b * N
    if HAS_SIZE:
        size_ptr += pid_b * N
    lanes = tl.arange(0, BLOCK_R)
    offs_r = tl.program_id(1) * BLOCK_R + lanes
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r = offs_r < R
    mask_d = offs_d < D
    row = pid_b * R + offs_r
    start = tl.load(starts_ptr + row, mask=mask_r, other=N)
    end = tl.load(starts_ptr + row + 1, mask=offs_r + 1 < R, other=N)
    total = tl.load(out_size_ptr + row, mask=mask_r, other=1.0)
    divisor = tl.where(total == 0, 1.0, total)
    merged = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    full = (end - start) // BLOCK_R  # number of full rounds of each row
    full_before = tl.cumsum(full, 0) - full
    for i in range(tl.sum(full, 0)):
        i_of_row = i - full_before
        is_current = (i_of_row >= 0) & (i_of_row < full)
        first = tl.sum(tl.where(is_current, start + i_of_row * BLOCK_R, 0), 0)
        current_divisor = tl.sum(tl.where(is_current, divisor, 0.0), 0)
        token = tl.load(order_ptr + first + lanes)
        share = _load_shares(
            tokens_ptr, size_ptr, stride_tn, token, current_divisor, offs_d, mask_d, HAS_SIZE
        )
        merged += tl.where(is_current[:, None], tl.sum(share, 0)[None, :], 0.0)

    place = start + full * BLOCK_R
    token = tl.load(order_ptr + place, mask=place < end, other=-1)
    for _ in range(tl.max(end - place, 0)):
        place += 1
        following = tl.load(order_ptr + place, mask=place < end, other=-1)
        merged += _load_shares(
            tokens_ptr, size_ptr, stride_tn, token, divisor, offs_d, mask_d, HAS_SIZE
        )
        token = following

    tl.store(
        out_ptr + row[:, None] * D + offs_d[None, :],
        merged.to(out_ptr.dtype.element_ty),
        mask=mask_r[:, None] & mask_d[None, :],
    )


@triton.jit(do_not_specialize=["N", "R"])
def _merge_bwd_kernel(
    grad_out_ptr, size_ptr, out_size_ptr, slots_ptr, grad_ptr, N, R, D,
    HAS_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gather the row of every token. Grid: (image, BLOCK_N tokens, slice of D)."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_d = (offs_d < D)[None, :]
    slot = tl.load(slots_ptr + pid_b * N + offs_n, mask=mask_n, other=0)
    has_row = mask_n & (slot >= 0) & (slot < R)
    total = tl.load(out_size_ptr + pid_b * R + slot, mask=has_row, other=1.0)
    size = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_SIZE:
        size = tl.load(size_ptr + pid_b * N + offs_n, mask=mask_n, other=0.0)
    g = tl.load(
        grad_out_ptr + (pid_b * R + slot)[:, None] * D + offs_d[None, :],
        mask=has_row[:, None] & mask_d,
        other=0.0,
    )  # [BLOCK_N, BLOCK_D]
    divisor = tl.where(total == 0, 1.0, total)
    scaled = g.to(tl.float32) * tl.div_rn(size, divisor)[:, None]
    tl.store(
        grad_ptr + (pid_b * N + offs_n)[:, None] * D + offs_d[None, :],
        scaled.to(g.dtype),
        mask=mask_n[:, None] & mask_d,
    )


def merge_fwd(
    tokens: Tensor, size: Tensor | None, slots: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Allocate and launch: the order of the tokens by rows, then the rows."""
    B, N, D = tokens.shape
    tokens, (size, slots) = launch.addressable(tokens), launch.contiguous(size, slots)
    out = tokens.new_empty(B, num_rows, D)
    out_size = tokens.new_empty(B, num_rows, dtype=torch.float32)
    order, starts = slots.new_empty(B, N), slots.new_empty(B, num_rows)
    options = {"HAS_SIZE": size is not None}
    settings = launch.order_by_row(N)
    launch.run(
        wrap_triton(_order_kernel),
        (B, launch.cdiv(max(N, num_rows), settings["BLOCK_N"])),
        *(size, slots, order, starts, out_size, N, num_rows),
        **settings,
        **options,
    )
    settings = launch.merge_gather(tokens.element_size())
    grid = B, launch.cdiv(num_rows, settings["BLOCK_R"]), launch.cdiv(D, settings["BLOCK_D"])
    launch.run(
        wrap_triton(_merge_fwd_kernel),
        grid,
        *(tokens, size, order, starts, out_size, out, tokens.stride(0), tokens.stride(1)),
        *(N, num_rows, D),
        **settings,
        **options,
    )
    return out, out_size


def merge_bwd(grad_out: Tensor, size: Tensor | None, out_size: Tensor, slots: Tensor) -> Tensor:
    """Allocate and launch."""
    grad_out, size, slots = launch.contiguous(grad_out, size, slots)
    (B, R, D), N = grad_out.shape, slots.shape[1]
    grad = grad_out.new_empty(B, N, D)
    settings = launch.reduce_backward(grad_out.element_size())
    grid = B, launch.cdiv(N, settings["BLOCK_N"]), launch.cdiv(D, settings["BLOCK_D"])
    launch.run(
        wrap_triton(_merge_bwd_kernel),
        grid,
        *(grad_out, size, out_size, slots, grad, N, R, D),
        HAS_SIZE=size is not None,
        **settings,
    )
    return grad
