"""Move tokens to their output rows, for images that one program cannot select and move at once.

Each program moves one slice of D of one image, tile by tile, starting with the last image. Tokens
are read once and written once, prefix tokens included. `select_kernels.py` selects the rows before.
"""

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels.ops.select_device import load_tile, part_and_slice, zero_rows


@triton.jit(do_not_specialize=["N", "R"])
def _move_kernel(
    tokens_ptr, out_ptr, weights_ptr, slots_ptr, stride_tb, stride_tn, N, R, D,
    MERGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy tokens to R rows; row R is the merged token. Grid: (image and slice of D)."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the images scored last are in L2
    pid_b, pid_d = part_and_slice(pid, D, BLOCK_D)
    pid_b = pid_b.to(tl.int64)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
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


def empty_outputs(
    tokens: Tensor,
    keep: int,
    num_prefix_tokens: int,
    merge: bool,
    *,
    weights: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate out (B, R, D), kept (B, K), weights (B, N) and slots (B, N)."""
    B, N, D = tokens.shape
    return (
        tokens.new_empty(B, num_prefix_tokens + keep + int(merge), D),
        tokens.new_empty(B, keep, dtype=torch.int64),
        tokens.new_empty(B, N, dtype=weights),
        tokens.new_empty(B, N, dtype=torch.int32),
    )


def launch_move(
    tokens: Tensor, out: Tensor, weights: Tensor, slots: Tensor, *, merge: bool
) -> None:
    """Write `out` (B, R, D) from tokens (B, N, D) whose last stride is 1."""
    (B, N, D), R = tokens.shape, out.shape[1] - merge
    settings = launch.move(N, tokens.element_size())
    launch.run(
        wrap_triton(_move_kernel),
        (B * launch.cdiv(D, settings["BLOCK_D"]),),
        *(tokens, out, weights, slots, *tokens.stride()[:2], N, R, D),
        MERGE=merge,
        **settings,
    )
