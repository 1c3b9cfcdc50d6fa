"""A whole stage boundary of scorer `last`, two kernels: the CLS row selects, then tokens move.

    a    = the CLS row of a pre-norm block, absorbed, with `cls` in place of token 0    (B, N)
    out  = reduce(tokens, a, K): [x_cls, x_kept, merged]                                (B, K+2, D)

Before them PyTorch makes the query u from the CLS token alone, B H D numbers (`absorbed.py`).
The first kernel reads the tokens once and ends in the selection; the second moves each slice of D
once, to rows that the first wrote. Small batches score tiles of patches instead, so that all SMs
have work, and each program of the second launch derives the selection anew from those scores: 4 HN
bytes beside its slice. `tokens` and the fused `cls` come apart, so nothing is copied to
put one into the other: x_cls of the output is the token's own. Gradients reach `tokens` through the
movement, as in `reduce`; the row gets none.
Source: ELIP, Eq. 2-4, the last layer's row read from the tokens as they enter the stage.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._autocast import no_autocast
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton
from elip_kernels._validate import check_flags, check_keep
from elip_kernels.absorbed import (
    absorbed_operands,
    absorbed_query,
    absorbed_row,
    accumulator,
    check_absorbed,
    row_of_scores,
    score_tiles,
    store_row,
)
from elip_kernels.cls_attention import absorbed_reference
from elip_kernels.info import ReductionInfo
from elip_kernels.reduce import (
    EPSILON,
    empty_outputs,
    reduce_backward_op,
    reduce_op,
    reduce_reference,
)
from elip_kernels.select import load_tile, move_tile, select_and_weigh, store_selection


@overload
def score_reduce(
    tokens: Tensor, cls: Tensor, keep: int | float, *, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, q_weight: Tensor, q_bias: Tensor | None,
    k_weight: Tensor, num_heads: int, scale: float | None = ..., merge: bool = ...,
    normalize: bool = ..., row: Tensor | None = ..., return_info: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def score_reduce(
    tokens: Tensor, cls: Tensor, keep: int | float, *, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, q_weight: Tensor, q_bias: Tensor | None,
    k_weight: Tensor, num_heads: int, scale: float | None = ..., merge: bool = ...,
    normalize: bool = ..., row: Tensor | None = ..., return_info: Literal[True],
) -> tuple[Tensor, ReductionInfo, Tensor]: ...  # fmt: skip
@overload
def score_reduce(
    tokens: Tensor, cls: Tensor, keep: int | float, *, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, q_weight: Tensor, q_bias: Tensor | None,
    k_weight: Tensor, num_heads: int, scale: float | None = ..., merge: bool = ...,
    normalize: bool = ..., row: Tensor | None = ..., return_info: bool,
) -> Tensor | tuple[Tensor, ReductionInfo, Tensor]: ...  # fmt: skip
def score_reduce(
    tokens: Tensor,
    cls: Tensor,
    keep: int | float,
    *,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    scale: float | None = None,
    merge: bool = True,
    normalize: bool = True,
    row: Tensor | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, ReductionInfo, Tensor]:
    """Score the patches by a block's CLS row, keep the best, merge the rest.

    Args:
        tokens: (B, N, D), before the block's norm; row 0 is CLS.
        cls: (B, D), the fused CLS token that scores.
        keep: int, patches to keep, fewer than N-1; or float ratio in (0, 1).
        norm_weight, .., scale: see `cls_attention_from_tokens`.
        merge, normalize: see `reduce`.
        row: (B, N) fp32, the row that an earlier call returned: it selects again, and nothing is
            scored. So a recomputed stage boundary keeps what its forward kept.
        return_info: also return the `ReductionInfo` and the attention row (B, N).

    Returns:
        (B, keep+2, D), or (B, keep+1, D) without merging, in the dtype of `tokens`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight}
    biases = {"q_bias": q_bias}
    scale = check_absorbed(tokens, cls, eps, num_heads, scale, norm, matrices, biases, least=3)
    keep = check_keep(keep, tokens.shape[1] - 1, all_allowed=False)
    check_flags(merge=merge, normalize=normalize, return_info=return_info)
    query = None
    if row is None:
        with torch.no_grad(), no_autocast(tokens):
            cls = cls.to(accumulator(tokens.dtype))
            query = absorbed_query(cls, norm, eps, q_weight, q_bias, k_weight, num_heads, scale)
    else:
        _check_row(row, tokens)
    out, kept, weights, _, row = _score_reduce_op(
        tokens, cls.detach(), query, eps, keep, merge, normalize, row
    )
    return (out, ReductionInfo(kept, weights, None, 1, merge), row) if return_info else out


def _check_row(row: Tensor, tokens: Tensor) -> None:
    expected = accumulator(tokens.dtype)
    if not isinstance(row, Tensor) or row.dtype != expected:
        raise TypeError(
            f"row: expected a {expected} tensor, as score_reduce returns it, got "
            f"{row.dtype if isinstance(row, Tensor) else type(row).__name__}"
        )
    if row.shape != tokens.shape[:2] or row.device != tokens.device:
        raise ValueError(
            f"row: expected (B, N) = {tuple(tokens.shape[:2])} on {tokens.device}, got "
            f"{tuple(row.shape)} on {row.device}"
        )


def score_reduce_reference(
    tokens: Tensor,
    cls: Tensor,
    query: Tensor | None,
    eps: float,
    keep: int,
    merge: bool,
    normalize: bool,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification -> out, kept, weights, slots as `reduce`, and the row (B, N); of query and
    row one is given."""
    given = row
    row = absorbed_reference(tokens, cls, query, eps)[1].mean(1) if given is None else given.clone()
    return *reduce_reference(tokens, row[:, 1:], None, keep, 1, merge, normalize), row


@triton.jit(do_not_specialize=["N", "K"])
def _score_select_kernel(
    tokens_ptr, query_ptr, rest_ptr, cls_score_ptr, row_ptr, kept_ptr, weights_ptr, slots_ptr,
    stride_tb, stride_tn, stride_ub, stride_uh, N, K, D, H, eps,
    MERGE: tl.constexpr, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program an image: the row, and from it kept positions, weights and output rows."""
    pid_b = tl.program_id(0).to(tl.int64)
    row, cls_row = absorbed_row(
        tokens_ptr + pid_b * stride_tb, query_ptr + pid_b * stride_ub, rest_ptr + pid_b * stride_ub,
        cls_score_ptr + pid_b * H, stride_tn, stride_uh, N, D, H, eps,
        HAS_REST, WIDEN, PRECISION, BLOCK_N, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - 1
    store_row(row_ptr + pid_b * N, row, cls_row, offs_n, mask_n)
    is_kept, slot, weight = select_and_weigh(row, mask_n, mask_n, K, MERGE, NORMALIZE, EPSILON)
    store_selection(
        kept_ptr, weights_ptr, slots_ptr, is_kept, slot, weight, offs_n, mask_n, pid_b, N, K, 1
    )


@triton.jit(do_not_specialize=["N", "K"])
def _move_kernel(
    tokens_ptr, out_ptr, weights_ptr, slots_ptr, stride_tb, stride_tn, N, K, D,
    MERGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (image, slice of D): tokens to the rows that were selected before."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N - 1
    mask_d = offs_d < D
    tokens_ptr += pid_b * stride_tb
    out_ptr += pid_b * (1 + K + MERGE) * D
    if MERGE:
        x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, mask_n, mask_d, 1)
    slot = tl.load(slots_ptr + pid_b * N + 1 + offs_n, mask=mask_n, other=0) - 1
    is_kept = mask_n & (slot < K)
    weight = tl.zeros([BLOCK_N], tl.float32)
    if MERGE:
        weight = tl.load(weights_ptr + pid_b * N + 1 + offs_n, mask=mask_n, other=0.0)
    else:
        x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, is_kept, mask_d, 1)
    move_tile(
        tokens_ptr, out_ptr, x, is_kept, slot, weight, stride_tn, offs_d, mask_d, K, D, 1, MERGE
    )


@triton.jit(do_not_specialize=["N", "K", "T"])
def _select_move_kernel(
    scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, tokens_ptr, out_ptr, row_ptr, kept_ptr,
    weights_ptr, slots_ptr, stride_tb, stride_tn, N, K, D, H, T,
    MERGE: tl.constexpr, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (image, slice of D); each derives row and selection anew from the scores."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N - 1
    mask_d = offs_d < D
    tokens_ptr += pid_b * stride_tb
    out_ptr += pid_b * (1 + K + MERGE) * D
    if MERGE:
        x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, mask_n, mask_d, 1)
    row, cls_row = row_of_scores(
        scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, pid_b, N, H, T, BLOCK_N, BLOCK_T
    )
    if tl.program_id(1) == 0:
        store_row(row_ptr + pid_b * N, row, cls_row, offs_n, mask_n)
    is_kept, slot, weight = select_and_weigh(row, mask_n, mask_n, K, MERGE, NORMALIZE, EPSILON)
    if tl.program_id(1) == 0:
        store_selection(
            kept_ptr, weights_ptr, slots_ptr, is_kept, slot, weight, offs_n, mask_n, pid_b, N, K, 1
        )
    if not MERGE:
        x = load_tile(tokens_ptr, stride_tn, offs_n, offs_d, is_kept, mask_d, 1)
    move_tile(
        tokens_ptr, out_ptr, x, is_kept, slot, weight, stride_tn, offs_d, mask_d, K, D, 1, MERGE
    )


def _score_reduce(
    tokens: Tensor,
    cls: Tensor,
    query: Tensor | None,
    eps: float,
    keep: int,
    merge: bool,
    normalize: bool,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate, read launch.py, launch twice; a row that is given is `reduce`'s, one launch."""
    if row is not None:
        return *reduce_op.launcher(tokens, row[:, 1:], None, keep, 1, merge, normalize), row.clone()
    (B, N, _), H = tokens.shape, query.shape[1]
    tokens = launch.addressable(tokens)
    out, kept, weights, slots = empty_outputs(tokens, keep, 1, merge)
    row = tokens.new_empty(B, N, dtype=torch.float32)
    outputs = out, kept, weights, slots, row
    if tokens.numel() > 0:
        operands = absorbed_operands(tokens, cls, query, eps)
        flags = {"MERGE": merge, "NORMALIZE": normalize, "EPSILON": EPSILON}
        run = _score_tiles_then_move if launch.splits_score(H, tokens) else _select_then_move
        with launch.on_device(tokens):
            run(tokens, operands, outputs, eps, keep, flags)
    return outputs


def _select_then_move(
    tokens: Tensor, operands: tuple, outputs: tuple, eps: float, keep: int, flags: dict
) -> None:
    """Large batches: one program an image scores and selects."""
    (B, N, D), (query, rest, cls_score) = tokens.shape, operands
    (out, kept, weights, slots, row), H = outputs, query.shape[1]
    strides = (tokens.stride(0), tokens.stride(1))
    _score_select_kernel[(B,)](
        *(tokens, query, query if rest is None else rest, cls_score, row, kept, weights, slots),
        *(*strides, *query.stride()[:2], N, keep, D, H, eps),
        **flags,
        **launch.score(H, tokens),
    )
    block_n, block_d, num_warps = launch.reduce_forward(N - 1, tokens.element_size())
    _move_kernel[(B, triton.cdiv(D, block_d))](
        *(tokens, out, weights, slots, *strides, N, keep, D),
        MERGE=flags["MERGE"],
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )


def _score_tiles_then_move(
    tokens: Tensor, operands: tuple, outputs: tuple, eps: float, keep: int, flags: dict
) -> None:
    """Small batches: a program for every tile of patches, then one for every slice of D."""
    (B, N, D), (query, rest, cls_score) = tokens.shape, operands
    (out, kept, weights, slots, row), H = outputs, query.shape[1]
    scores, tops, totals = score_tiles(tokens, query, rest, eps)
    block_n, block_d, num_warps = launch.reduce_forward(N - 1, tokens.element_size())
    T = tops.shape[2]
    _select_move_kernel[(B, triton.cdiv(D, block_d))](
        *(scores, tops, totals, cls_score, tokens, out, row, kept, weights, slots),
        *(tokens.stride(0), tokens.stride(1), N, keep, D, H, T),
        **flags,
        BLOCK_N=block_n,
        BLOCK_T=launch.next_power_of_2(T),
        BLOCK_D=block_d,
        num_warps=num_warps,
    )


def _fake(tokens, cls, query, eps, keep, merge, normalize, row=None):
    given = query if row is None else row
    return *empty_outputs(tokens, keep, 1, merge, weights=given.dtype), given.new_empty(
        tokens.shape[:2]
    )


def _save_for_backward(ctx, inputs, output) -> None:
    _, kept, weights, slots, row = output
    ctx.mark_non_differentiable(kept, weights, slots, row)
    ctx.save_for_backward(slots, weights)
    ctx.merge = inputs[5]


def _backward(ctx, grad_out, *_):
    return reduce_backward_op(grad_out, *ctx.saved_tensors, ctx.merge), *[None] * 7


def _flops(tokens_shape, cls_shape, query_shape, eps, keep, merge, *args, **kwargs) -> int:
    """2 B H N D for a row, 2 for each element of a dropped token that is merged."""
    B, N, D = tokens_shape
    H = 0 if query_shape is None else query_shape[1]
    return 2 * B * D * (H * N + (N - 1 - keep) * merge)


_score_reduce_op = Operator(
    "score_reduce",
    score_reduce_reference,
    launcher=_score_reduce,
    fits=lambda tokens, cls, query, *_: launch.runs_kernel(
        *((tokens,) if query is None else (tokens, query)), candidates=tokens.shape[1] - 1
    ),
    fake=_fake,
    flops=_flops,
    backward=_backward,
    save=_save_for_backward,
)
