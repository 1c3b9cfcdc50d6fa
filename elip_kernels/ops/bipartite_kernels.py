"""Triton kernels of the matching in `bipartite.py`, which documents the formulas.

    match      grid (image, tile of A): products with tiles of B, running arg-max -> best, partner
    slots      grid (image): the r best of A -> slots, the output row of every token
    slots_of   grid (image, tile of A): beyond 4,096 tokens of A, none of them padding,
               `select_kernels.py` selects the r best first, and each tile of A looks up its tokens
               among them

Traffic: each program of `match` reads its tile of A and all of B (from L2 after the first).
"""

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import is_interpreted, tl, triton, wrap_triton
from elip_kernels.ops.select_device import kth_largest, order_key, output_slots
from elip_kernels.ops.select_kernels import launch_select

SMALLEST_SQUARE = torch.finfo(torch.float32).tiny  # of a vector with a direction


@triton.jit
def inverse_norm(square, SMALLEST_SQUARE: tl.constexpr):
    """Return 1 / sqrt(square), or NaN if the vector has no direction."""
    has_direction = (square >= SMALLEST_SQUARE) & (square < float("inf"))
    return tl.where(has_direction, tl.rsqrt(square), float("nan"))


@triton.jit
def tile_products(
    metric_ptr, stride_mn, rows_a, rows_b, mask_a, mask_b, C,
    WIDEN: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return products [BLOCK_A, BLOCK_B] of two lists of tokens, and their squared norms."""
    square_a = tl.zeros([BLOCK_A], tl.float32)
    square_b = tl.zeros([BLOCK_B], tl.float32)
    product = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for start_c in range(0, C, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        a = tl.load(
            metric_ptr + rows_a[:, None] * stride_mn + offs_c[None, :],
            mask=mask_a[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_A, BLOCK_C]
        b = tl.load(
            metric_ptr + rows_b[:, None] * stride_mn + offs_c[None, :],
            mask=mask_b[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_B, BLOCK_C]
        wide_a = a.to(tl.float32)
        wide_b = b.to(tl.float32)
        square_a += tl.sum(wide_a * wide_a, 1)
        square_b += tl.sum(wide_b * wide_b, 1)
        if WIDEN:  # in the interpreter, tl.dot of bf16 is wrong
            a = wide_a
            b = wide_b
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
    return product, square_a, square_b


@triton.jit(do_not_specialize=["N"])
def _match_kernel(
    metric_ptr, penalty_ptr, lengths_ptr, best_ptr, partner_ptr, stride_mb, stride_mn, N, C,
    SMALLEST_SQUARE: tl.constexpr, HAS_PENALTY: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Find the best partner of each token of A, minus a penalty. Grid: (image, BLOCK_A tokens)."""
    pid_b = tl.program_id(0).to(tl.int64)
    metric_ptr += pid_b * stride_mb
    length = N
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + pid_b).to(tl.int32)
    num_a = (N + 1) // 2
    num_b = length // 2
    offs_a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < (length + 1) // 2
    square_a = tl.zeros([BLOCK_A], tl.float32)
    best = tl.full([BLOCK_A], float("-inf"), tl.float32)
    partner = tl.zeros([BLOCK_A], tl.int32)
    for start_b in range(0, num_b, BLOCK_B):
        offs_b = start_b + tl.arange(0, BLOCK_B)
        mask_b = offs_b < num_b
        product, square_a, square_b = tile_products(
            metric_ptr, stride_mn, 2 * offs_a, 2 * offs_b + 1, mask_a, mask_b, C,
            WIDEN, BLOCK_A, BLOCK_B, BLOCK_C,
        )  # fmt: skip
        similarity = product * inverse_norm(square_b, SMALLEST_SQUARE)[None, :]
        is_number = mask_b[None, :] & (similarity == similarity)
        similarity = tl.where(is_number, similarity, float("-inf"))
        tile_best, tile_partner = tl.max(similarity, 1, return_indices=True)
        is_better = tile_best > best
        best = tl.where(is_better, tile_best, best)
        partner = tl.where(is_better, start_b + tile_partner, partner)
    best = best * inverse_norm(square_a, SMALLEST_SQUARE)
    has_direction = best == best
    row = pid_b * num_a + offs_a
    best = tl.where(has_direction, best, float("-inf"))
    if HAS_PENALTY:
        best -= tl.load(penalty_ptr + pid_b * N + 2 * offs_a, mask=mask_a, other=0.0)
        best = tl.where(best == best, best, float("-inf"))
    tl.store(best_ptr + row, best, mask=mask_a)
    tl.store(partner_ptr + row, tl.where(has_direction, partner, 0), mask=mask_a)


@triton.jit(do_not_specialize=["N", "R"])
def _slots_kernel(
    best_ptr, partner_ptr, lengths_ptr, merges_ptr, slots_ptr, N, R,
    HAS_LENGTHS: tl.constexpr, P: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Select the r best of A and store the output row of every token. Grid: (image)."""
    pid_b = tl.program_id(0).to(tl.int64)
    length = N
    r = R
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + pid_b).to(tl.int32)
        r = tl.load(merges_ptr + pid_b).to(tl.int32)
    num_a = (N + 1) // 2
    real_a = (length + 1) // 2
    first_b = real_a - r
    offs_a = tl.arange(0, BLOCK_A)
    mask_a = offs_a < real_a
    is_candidate = mask_a & (offs_a >= P)
    best = tl.load(best_ptr + pid_b * num_a + offs_a, mask=mask_a, other=0.0)
    partner = tl.load(partner_ptr + pid_b * num_a + offs_a, mask=mask_a, other=0)
    key = order_key(best, is_candidate, is_candidate)  # [BLOCK_A]
    is_merged, merged_before = output_slots(key, kth_largest(key, r), r)
    slot_a = tl.where(is_merged, first_b + partner, offs_a - merged_before)
    slot_b = first_b + offs_a
    if HAS_LENGTHS:  # without a pair, tokens stay in order; padding takes the last row
        last = N - R - 1
        slot_a = tl.where(r == 0, 2 * offs_a, slot_a)
        slot_b = tl.where(r == 0, 2 * offs_a + 1, slot_b)
        slot_a = tl.where(mask_a, tl.minimum(slot_a, last), last)
        slot_b = tl.where(2 * offs_a + 1 < length, tl.minimum(slot_b, last), last)
    _store_slots(slots_ptr + pid_b * N, slot_a, slot_b, offs_a, N)


@triton.jit
def _store_slots(slots_ptr, slot_a, slot_b, offs_a, N):
    """Store the output rows of tokens of A and B."""
    tl.store(slots_ptr + 2 * offs_a, slot_a, mask=2 * offs_a < N)
    tl.store(slots_ptr + 2 * offs_a + 1, slot_b, mask=2 * offs_a + 1 < N)


@triton.jit(do_not_specialize=["N", "R"])
def _slots_of_kernel(
    merged_ptr, partner_ptr, slots_ptr, N, R, BITS: tl.constexpr, BLOCK_A: tl.constexpr
):  # fmt: skip
    """Store output rows by bisection among the R merged tokens. Grid: (image, BLOCK_A tokens)."""
    pid_b = tl.program_id(0).to(tl.int64)
    merged_ptr += pid_b * R
    num_a = (N + 1) // 2
    first_b = num_a - R
    offs_a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < num_a
    before = tl.zeros([BLOCK_A], tl.int32)  # how many of the R come before; one bit per step
    for bit in tl.static_range(BITS):
        place = before + (1 << (BITS - 1 - bit))
        known = tl.load(merged_ptr + place - 1, mask=place <= R, other=N)
        before = tl.where(known < offs_a, place, before)
    known = tl.load(merged_ptr + before, mask=before < R, other=N)
    partner = tl.load(partner_ptr + pid_b * num_a + offs_a, mask=mask_a, other=0)
    slot = tl.where(known == offs_a, first_b + partner, offs_a - before)
    _store_slots(slots_ptr + pid_b * N, slot, first_b + offs_a, offs_a, N)


def match(
    metric: Tensor,
    penalty: Tensor | None,
    r: int,
    num_prefix_tokens: int,
    lengths: Tensor | None = None,
    merges: Tensor | None = None,
) -> Tensor:
    """Allocate and launch: scores and partners, then slots.

    If there are many tokens, all of them real, the r best are selected before the slots.
    """
    B, N, C = metric.shape
    metric = launch.addressable(metric)
    penalty, lengths, merges = launch.contiguous(penalty, lengths, merges)
    num_a = (N + 1) // 2
    best = metric.new_empty(B, num_a, dtype=torch.float32)
    partner = metric.new_empty(B, num_a, dtype=torch.int32)
    slots = metric.new_empty(B, N, dtype=torch.int32)
    settings = launch.bipartite_match(C, metric.element_size())
    launch.run(
        wrap_triton(_match_kernel),
        (B, launch.cdiv(num_a, settings["BLOCK_A"])),
        *(metric, penalty, lengths, best, partner, metric.stride(0), metric.stride(1), N, C),
        SMALLEST_SQUARE=SMALLEST_SQUARE,
        HAS_PENALTY=penalty is not None,
        HAS_LENGTHS=lengths is not None,
        WIDEN=is_interpreted(),
        **settings,
    )
    if num_a <= launch.MAX_SELECTED:
        block_a, _, num_warps = launch.select(num_a, 1)
        launch.run(
            wrap_triton(_slots_kernel),
            (B,),
            *(best, partner, lengths, merges, slots, N, r),
            HAS_LENGTHS=lengths is not None,
            P=num_prefix_tokens,
            BLOCK_A=block_a,
            num_warps=num_warps,
        )
        return slots
    merged = best.new_empty(B, r, dtype=torch.int64)
    launch_select(best[:, num_prefix_tokens:], None, merged, num_prefix_tokens=num_prefix_tokens)
    block_a, _, num_warps = launch.row(num_a, 1)
    launch.run(
        wrap_triton(_slots_of_kernel),
        (B, launch.cdiv(num_a, block_a)),
        *(merged, partner, slots, N, r),
        BITS=r.bit_length(),
        BLOCK_A=block_a,
        num_warps=num_warps,
    )
    return slots
