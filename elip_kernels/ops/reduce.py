"""Keep the K most attended tokens in image order and merge the others into one.

    tokens x (B, N, D), p prefix tokens first; scores a (B, N-p); K kept candidates
    kept    = the K largest a, ascending; ties: the lower index; NaN after all numbers, padding last
    w_n     = a_n / (sum of dropped a + 1e-6) for dropped n, 0 where a_n is not finite
    out     = [x_prefix, x_kept, sum_n w_n x_n]                                  (B, p+K+1, D)
    grad_x_n = grad_out[slot_n] for kept and prefix tokens, w_n * grad_out[p+K] for the others

The scores get no gradient. Sums are fp32 (fp64 if an input is fp64). Kept rows are exact copies.
Traffic: every program reads N scores, reads its slice of D once and writes it once. Beyond 1,024
candidates, selection (`select_kernels.py`) and movement (`scatter_tokens.py`) are two launches.
Source: ELIP, Eq. 3 and 4.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels._validate import check_flags, reduce_arguments
from elip_kernels.info import ReductionInfo
from elip_kernels.ops.gather_ops import (
    accumulator,
    add_rows,
    merge_rows,
    places,
    sum_rows,
    take_rows,
)
from elip_kernels.ops.scatter_tokens import empty_outputs, launch_move
from elip_kernels.ops.select_device import (
    LEAST_SUM,
    SUM_SCALE,
    load_tile,
    move_tile,
    part_and_slice,
    select_and_weigh,
    store_prefix,
    store_selection,
)
from elip_kernels.ops.select_kernels import launch_select


@overload
def reduce(
    tokens: Tensor, attn: Tensor, keep: int | float, *, merge: bool = ...,
    mask: Tensor | None = ..., num_prefix_tokens: int = ..., return_info: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def reduce(
    tokens: Tensor, attn: Tensor, keep: int | float, *, merge: bool = ...,
    mask: Tensor | None = ..., num_prefix_tokens: int = ..., return_info: Literal[True],
) -> tuple[Tensor, ReductionInfo]: ...  # fmt: skip
@overload
def reduce(
    tokens: Tensor, attn: Tensor, keep: int | float, *, merge: bool = ...,
    mask: Tensor | None = ..., num_prefix_tokens: int = ..., return_info: bool,
) -> Tensor | tuple[Tensor, ReductionInfo]: ...  # fmt: skip
def reduce(
    tokens: Tensor,
    attn: Tensor,
    keep: int | float,
    *,
    merge: bool = True,
    mask: Tensor | None = None,
    num_prefix_tokens: int = 1,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, ReductionInfo]:
    """Keep the `keep` most attended tokens in image order; merge the rest into one (ELIP, Eq. 3-4).

    Example::

        out = elip_kernels.reduce(tokens, attn, 0.65)  # (8, 197, 768) -> (8, 1 + 127 + 1, 768)

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64. Gradients reach tokens only.
        attn: scores (B, N-p) or (B, N); or attention rows (B, H, N) or a whole map (B, H, N, N),
            whose CLS row is averaged over heads. Same dtypes. Merging uses them as weights, so
            they must not be negative.
        keep: int, number of candidates to keep; or float, a ratio r in (0, 1] of the N-p
            candidates, max(1, int(r * (N-p))). If all are kept, `tokens` itself is returned.
        merge: append the mean of the dropped tokens, weighted by their scores.
        mask: (B, N) bool, True = real. Padding is kept only if there are fewer real tokens than
            `keep`; it then fills the last rows. Padding is never merged.
        num_prefix_tokens: p, the number of leading tokens that are always kept.
        return_info: also return a `ReductionInfo`.

    Returns:
        (B, p+keep+1, D), or (B, p+keep, D) without merging, in the dtype of `tokens`; with
        `return_info`, a `ReductionInfo` as well.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    scores, keep = reduce_arguments(tokens, attn, keep, mask, num_prefix_tokens)
    check_flags(merge=merge, return_info=return_info)
    p = num_prefix_tokens
    if keep == scores.shape[1]:
        if not return_info:
            return tokens
        B, N, _ = tokens.shape
        kept = torch.arange(p, N, device=tokens.device).expand(B, -1)
        weights = tokens.new_zeros(B, N, dtype=accumulator(tokens, scores))
        return tokens, ReductionInfo(kept, weights, mask, p, merged=False)
    out, kept, weights, _ = reduce_op(tokens, scores, mask, keep, p, merge)
    if not return_info:
        return out
    if mask is not None:  # the merged token is real if a real token was dropped
        merged = [mask[:, p:].sum(1, keepdim=True) > keep] if merge else []
        mask = torch.cat([mask[:, :p], mask.gather(1, kept), *merged], dim=1)
    return out, ReductionInfo(kept, weights, mask, p, merge)


def reduce_reference(
    tokens: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    keep: int,
    num_prefix_tokens: int,
    merge: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `reduce` in PyTorch: out (B, R, D), kept (B, K), weights, slots int32 (B, N)."""
    B, N, _ = tokens.shape
    first_dropped = num_prefix_tokens + keep
    real = None if mask is None else mask[:, num_prefix_tokens:]
    scores = scores.to(accumulator(tokens, scores))
    place = F.pad(places(scores, real, keep) + num_prefix_tokens, (num_prefix_tokens, 0))
    index = torch.arange(N, device=tokens.device)
    place[:, :num_prefix_tokens] = index[:num_prefix_tokens].expand(B, -1)
    order = place.scatter(1, place, index.expand(B, -1))
    # The last row is a placeholder, which the merged token overwrites.
    out, weights = take_rows(tokens, order[:, : first_dropped + int(merge)]), scores.new_zeros(B, N)
    if merge:
        dropped = order[:, first_dropped:]
        weight = scores.gather(1, dropped - num_prefix_tokens).nan_to_num(0.0, 0.0, 0.0)
        if mask is not None:
            weight = weight * mask.gather(1, dropped)
        is_exported = torch.compiler.is_exporting()  # ONNX export drops + 1e-8 and below
        scale = 1.0 if is_exported else SUM_SCALE
        total = (weight * scale).sum(1, keepdim=True) + LEAST_SUM * scale
        weight = weight / total * scale
        weights = weights.scatter(1, dropped, weight)
        out[:, -1] = merge_rows(tokens, dropped, weight)
    kept = order[:, num_prefix_tokens:first_dropped].clone(memory_format=torch.contiguous_format)
    return out, kept, weights, place.clamp(max=first_dropped).int()


def reduce_backward_reference(
    grad_out: Tensor, slots: Tensor, weights: Tensor, merge: bool
) -> Tensor:
    """Return grad_tokens (B, N, D) from grad_out (B, R, D)."""
    R = grad_out.shape[1]
    rows, scale = _movement(slots, weights, R, merge)
    grad = sum_rows(grad_out, rows[..., None], scale[..., None])
    return grad if merge else grad.masked_fill_((slots == R)[..., None], 0.0)


def _movement(slots: Tensor, weights: Tensor, R: int, merge: bool) -> tuple[Tensor, Tensor]:
    """Return the output row (B, N) of each token, of R, and its factor: 0 if it is dropped."""
    scale = weights.masked_fill(slots < R - int(merge), 1.0)
    return slots.clamp(max=R - 1).long(), scale


@triton.jit(do_not_specialize=["N", "K"])
def _reduce_fwd_kernel(
    tokens_ptr, scores_ptr, mask_ptr, out_ptr, kept_ptr, weights_ptr, slots_ptr,
    stride_tb, stride_tn, stride_sb, stride_mb, N, K, D,
    P: tl.constexpr, MERGE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Select and move a slice of D. Grid: (image and slice of D); each program selects again."""
    pid_b, pid_d = part_and_slice(tl.program_id(0), D, BLOCK_D)
    pid_b = pid_b.to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N - P
    mask_d = offs_d < D
    tokens_ptr += pid_b * stride_tb
    out_ptr += pid_b * (P + K + MERGE) * D
    if MERGE:  # all rows are needed: load them while the selection runs
        x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, mask_n, mask_d, P)
    score = tl.load(scores_ptr + pid_b * stride_sb + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    is_real = mask_n
    if HAS_MASK:
        real = tl.load(mask_ptr + pid_b * stride_mb + P + offs_n, mask=mask_n, other=0)
        is_real = mask_n & (real != 0)
    is_kept, slot, weight = select_and_weigh(score, is_real, mask_n, K, MERGE)
    if pid_d == 0:
        store_selection(
            kept_ptr, weights_ptr, slots_ptr, is_kept, slot, weight, offs_n, mask_n, pid_b, N, K, P
        )
        store_prefix(weights_ptr, slots_ptr, pid_b, N, P)
    if not MERGE:
        x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, is_kept, mask_d, P)
    move_tile(
        tokens_ptr, out_ptr, x, is_kept, slot, weight, stride_tn, offs_d, mask_d, K, D, P, MERGE
    )


@triton.jit(do_not_specialize=["N", "R"])
def _reduce_bwd_kernel(
    grad_out_ptr, slots_ptr, weights_ptr, grad_ptr, N, R, D,
    MERGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gather gradients; every row is written once. Grid: (image, BLOCK_N tokens, slice of D)."""
    pid, pid_d = part_and_slice(tl.program_id(0), D, BLOCK_D)
    tiles = tl.cdiv(N, BLOCK_N)
    pid_b = (pid // tiles).to(tl.int64)
    offs_n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_d = offs_d < D
    slot = tl.load(slots_ptr + pid_b * N + offs_n, mask=mask_n, other=0)
    is_copied = slot < R - MERGE
    weight = tl.zeros([BLOCK_N], tl.float32)
    if MERGE:
        weight = tl.load(weights_ptr + pid_b * N + offs_n, mask=mask_n, other=0.0)
    g = tl.load(
        grad_out_ptr + pid_b * R * D + slot[:, None] * D + offs_d[None, :],
        mask=(mask_n & (slot < R))[:, None] & mask_d[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_D]
    scaled = g.to(tl.float32) * tl.where(is_copied, 1.0, weight)[:, None]
    tl.store(
        grad_ptr + pid_b * N * D + offs_n[:, None] * D + offs_d[None, :],
        scaled.to(g.dtype),
        mask=mask_n[:, None] & mask_d[None, :],
    )


def _reduce_fwd(
    tokens: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    keep: int,
    num_prefix_tokens: int,
    merge: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate and launch."""
    B, N, D = tokens.shape
    tokens = launch.addressable(tokens)
    scores, mask = launch.dense_rows(scores, mask)
    out, kept, weights, slots = empty_outputs(tokens, keep, num_prefix_tokens, merge)
    if scores.shape[1] > launch.MAX_MOVED:
        real, p = None if mask is None else mask[:, num_prefix_tokens:], num_prefix_tokens
        launch_select(scores, real, kept, weights, slots, num_prefix_tokens=p, merge=merge)
        launch_move(tokens, out, weights, slots, merge=merge)
        return out, kept, weights, slots
    settings = launch.reduce_forward(scores.shape[1], tokens.element_size())
    launch.run(
        wrap_triton(_reduce_fwd_kernel),
        (B * launch.cdiv(D, settings["BLOCK_D"]),),
        *(tokens, scores, mask, out, kept, weights, slots),
        *(tokens.stride(0), tokens.stride(1), scores.stride(0)),
        *(0 if mask is None else mask.stride(0), N, keep, D),
        P=num_prefix_tokens,
        MERGE=merge,
        HAS_MASK=mask is not None,
        **settings,
    )
    return out, kept, weights, slots


def _reduce_bwd(grad_out: Tensor, slots: Tensor, weights: Tensor, merge: bool) -> Tensor:
    """Allocate and launch."""
    grad_out = grad_out.contiguous()
    (B, R, D), N = grad_out.shape, slots.shape[1]
    grad = grad_out.new_empty(B, N, D)
    settings = launch.reduce_backward(grad_out.element_size())
    tiles = launch.cdiv(N, settings["BLOCK_N"]) * launch.cdiv(D, settings["BLOCK_D"])
    launch.run(
        wrap_triton(_reduce_bwd_kernel),
        (B * tiles,),
        *(grad_out, slots, weights, grad, N, R, D),
        MERGE=merge,
        **settings,
    )
    return grad


def _fake(tokens, scores, mask, keep, num_prefix_tokens, merge):
    weights = accumulator(tokens, scores)
    return empty_outputs(tokens, keep, num_prefix_tokens, merge, weights=weights)


def _save_for_backward(ctx, inputs, output) -> None:
    _, kept, weights, slots = output
    ctx.mark_non_differentiable(kept, weights, slots)
    ctx.save_for_backward(slots, weights)
    ctx.merge = inputs[5]


def _backward(ctx, grad_out, *_):
    return reduce_backward_op(grad_out, *ctx.saved_tensors, ctx.merge), *[None] * 5


def _save_movement(ctx, inputs, output) -> None:
    grad_out, slots, weights, ctx.merge = inputs
    ctx.R = grad_out.shape[1]
    ctx.save_for_backward(slots, weights)


def _backward_of_backward(ctx, grad):
    """Move `grad` by the same rows and weights, because the backward is linear in grad_out."""
    rows, scale = _movement(*ctx.saved_tensors, ctx.R, ctx.merge)
    return add_rows(grad, rows, scale, ctx.R), None, None, None


def _flops(tokens_shape, scores_shape, mask_shape, keep, p, merge, *args, **kwargs) -> int:
    """Return a multiply and an add for each element of a dropped token that is merged."""
    B, candidates = scores_shape
    return 2 * B * (candidates - keep) * tokens_shape[2] if merge else 0


def _backward_fake(grad_out, slots, weights, merge):
    return grad_out.new_empty(*slots.shape, grad_out.shape[2])


def _backward_flops(grad_out_shape, slots_shape, weights_shape, merge, *args, **kwargs) -> int:
    """Return a multiply for each element of a dropped token that was merged."""
    B, R, D = grad_out_shape
    return B * (slots_shape[1] + 1 - R) * D if merge else 0


reduce_op = Operator(
    "reduce",
    reduce_reference,
    launcher=_reduce_fwd,
    unsupported=lambda tokens, scores, mask, keep, num_prefix_tokens, *_: launch.unsupported(
        *(tokens, scores), candidates=scores.shape[1], num_prefix_tokens=num_prefix_tokens
    ),
    fake=_fake,
    flops=_flops,
    backward=_backward,
    save=_save_for_backward,
)
reduce_backward_op = Operator(
    "reduce_backward",
    reduce_backward_reference,
    launcher=_reduce_bwd,
    unsupported=lambda grad_out, slots, weights, merge: launch.unsupported(grad_out, weights),
    fake=_backward_fake,
    flops=_backward_flops,
    backward=_backward_of_backward,
    save=_save_movement,
)


@example_of(reduce)
def _example(sizes: Sizes) -> Arguments:
    scores = torch.randn(sizes.B, sizes.N).softmax(-1)
    return {"tokens": sizes.tokens(), "attn": scores, "keep": sizes.K, "return_info": True}
