"""Score patches with a block's CLS row, select and merge: a stage boundary of scorer `last`.

    c    = f x_cls + (1 - f) x_text, if there is a text                                 (B, D)
    a    = the CLS row of a pre-norm block, absorbed, with c in place of token 0        (B, N)
    out  = reduce(tokens, a, K): [x_cls, x_kept, merged]                                (B, K+2, D)

There are four kernels. The first makes the query u (`absorbed_query.py`). The second reads the
tokens once and stores their scores, 4 HN bytes (`absorbed.py`). The third combines the scores of an
image into a row and selects. The fourth moves each slice of D once, in tiles of tokens
(`scatter_tokens.py`). The selection of an image is bitwise equal for every batch size. `tokens` and
the fused CLS token are separate inputs, so no token is copied; the CLS token of the output is that
of `tokens`. `scored` may replace `tokens` for scoring, for example after a dry run of the stage.
Gradients reach `tokens` as in `reduce`; the row has none.
Source: ELIP, Eq. 1-4, with the row of the stage's last layer computed from the stage's input
tokens.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels._validate import (
    check_device,
    check_flags,
    check_keep,
    check_shape,
    check_tensor,
    message,
)
from elip_kernels.info import ReductionInfo
from elip_kernels.ops.absorbed import (
    STATS,
    launch_row,
    query_arguments,
    row_of_scores,
    score_tiles,
)
from elip_kernels.ops.absorbed_query import QueryArguments, launch_query, with_query_signature
from elip_kernels.ops.cls_attention import absorbed_flops, absorbed_reference, absorbed_unsupported
from elip_kernels.ops.gather_ops import accumulator
from elip_kernels.ops.reduce import reduce_backward_op, reduce_reference
from elip_kernels.ops.scatter_tokens import empty_outputs, launch_move
from elip_kernels.ops.select_device import select_and_weigh, store_prefix, store_selection
from elip_kernels.ops.select_kernels import launch_select


@overload
def score_reduce(
    tokens: Tensor, cls: Tensor, keep: int | float, *, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, q_weight: Tensor, q_bias: Tensor | None,
    k_weight: Tensor, num_heads: int, scale: float | None = ..., text: Tensor | None = ...,
    fusion: float = ..., guidance_norm: Literal["none", "match"] = ..., merge: bool = ...,
    scored: Tensor | None = ..., row: Tensor | None = ..., return_info: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def score_reduce(
    tokens: Tensor, cls: Tensor, keep: int | float, *, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, q_weight: Tensor, q_bias: Tensor | None,
    k_weight: Tensor, num_heads: int, scale: float | None = ..., text: Tensor | None = ...,
    fusion: float = ..., guidance_norm: Literal["none", "match"] = ..., merge: bool = ...,
    scored: Tensor | None = ..., row: Tensor | None = ..., return_info: Literal[True],
) -> tuple[Tensor, ReductionInfo, Tensor]: ...  # fmt: skip
@overload
def score_reduce(
    tokens: Tensor, cls: Tensor, keep: int | float, *, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, q_weight: Tensor, q_bias: Tensor | None,
    k_weight: Tensor, num_heads: int, scale: float | None = ..., text: Tensor | None = ...,
    fusion: float = ..., guidance_norm: Literal["none", "match"] = ..., merge: bool = ...,
    scored: Tensor | None = ..., row: Tensor | None = ..., return_info: bool,
) -> Tensor | tuple[Tensor, ReductionInfo, Tensor]: ...  # fmt: skip
def score_reduce(
    tokens: Tensor, cls: Tensor, keep: int | float, *, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, q_weight: Tensor, q_bias: Tensor | None,
    k_weight: Tensor, num_heads: int, scale: float | None = None, text: Tensor | None = None,
    fusion: float = 1, guidance_norm: Literal["none", "match"] = "none", merge: bool = True,
    scored: Tensor | None = None, row: Tensor | None = None, return_info: bool = False,
) -> Tensor | tuple[Tensor, ReductionInfo, Tensor]:  # fmt: skip
    """Score the patches by a block's CLS row, keep the best and merge the rest.

    The result is that of `cls_attention_from_tokens` followed by `reduce`. Example::

        out = elip_kernels.score_reduce(
            tokens, tokens[:, 0], 0.65, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
            q_weight=q.weight, q_bias=q.bias, k_weight=k.weight, num_heads=12,
        )

    Source: ELIP, Eq. 1-4.

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64, before the block's norm; row 0 is CLS.
        cls: (B, D), the CLS token that scores.
        keep: int, patches to keep, fewer than N-1; or float, a ratio in (0, 1).
        norm_weight: (D,), weight of the block's LayerNorm, or None.
        norm_bias: (D,), bias of the block's LayerNorm, or None.
        eps: epsilon of the LayerNorm.
        q_weight: (H*d, D), weight of the query projection, as in nn.Linear.
        q_bias: (H*d,), bias of the query projection, or None.
        k_weight: (H*d, D), weight of the key projection.
        num_heads: H.
        scale: factor of the scores; d ** -0.5 by default.
        text: (B, D), or (1, D) for all images, fused with `cls` first; zeros mean no text.
        fusion: share of `cls` in the fusion, in [0, 1]. With 1 the text is not read; without a
            text it must be 1.
        guidance_norm: "match" first scales the text to the norm of `cls`; "none" does not.
        merge: append the mean of the dropped tokens, weighted by the row.
        scored: (B, N, D), tokens to score instead of `tokens`, for example after a dry run. They
            get no gradient.
        row: (B, N) fp32, the row that an earlier call returned. It is used instead of scoring, so
            that activation checkpointing selects the same tokens again.
        return_info: also return the `ReductionInfo` and the attention row (B, N).

    Returns:
        (B, keep+2, D), or (B, keep+1, D) without merging, in the dtype of `tokens`; with
        `return_info`, also a `ReductionInfo` and the row (B, N).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight}
    guide = {"text": text, "fusion": fusion, "guidance_norm": guidance_norm}
    query = query_arguments(
        *(tokens, cls, eps, num_heads, scale, norm, matrices, {"q_bias": q_bias}), **guide, least=3
    )
    keep = check_keep(keep, tokens.shape[1] - 1, all_allowed=False)
    check_flags(merge=merge, return_info=return_info)
    other = _check_scored_and_row(scored, row, tokens)
    out, kept, weights, _, row = _score_reduce_op(tokens, *query, keep, merge, *other)
    return (out, ReductionInfo(kept, weights, None, 1, merge), row) if return_info else out


def _check_scored_and_row(
    scored: Tensor | None, row: Tensor | None, tokens: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Check `scored` and `row`; return `scored` without gradient, and `row`."""
    if scored is not None:
        check_tensor("scored", scored, "(B, N, D)", 3)
        check_shape("scored", scored, tuple(tokens.shape), "(B, N, D)")
        check_device("scored", scored, "tokens", tokens)
        scored = scored.detach()
    if row is None:
        return scored, row
    expected = accumulator(tokens if scored is None else scored)
    if not isinstance(row, Tensor) or row.dtype != expected:
        raise TypeError(message("row", f"a {expected} tensor, as score_reduce returns it", row))
    check_shape("row", row, tuple(tokens.shape[:2]), "(B, N)")
    check_device("row", row, "tokens", tokens)
    return scored, row


@with_query_signature(keep=int, merge=bool, scored=Tensor | None, row=Tensor | None)
def score_reduce_reference(
    tokens: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `score_reduce` in PyTorch: the outputs of `reduce`, and the row (B, N)."""
    query, (keep, merge, scored, row) = _split_arguments(arguments)
    scored = (tokens if scored is None else scored).detach()
    row = absorbed_reference(scored, *query)[1].mean(1) if row is None else _copy(row)
    return *reduce_reference(tokens, row[:, 1:], None, keep, 1, merge), row


@triton.jit(do_not_specialize=["N", "K", "T"], do_not_specialize_on_alignment=STATS)
def _score_select_kernel(
    scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, row_ptr, kept_ptr, weights_ptr, slots_ptr,
    N, K, H, T,
    MERGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Combine the scores of an image into its row, and select from it. Grid: (image)."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - 1
    row, cls_row = row_of_scores(
        scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, pid_b, 0, N, H, T,
        BLOCK_N, BLOCK_T, BLOCK_H,
    )  # fmt: skip
    tl.store(row_ptr + pid_b * N + 1 + offs_n, row, mask=mask_n)
    tl.store(row_ptr + pid_b * N, cls_row)
    is_kept, slot, weight = select_and_weigh(row, mask_n, mask_n, K, MERGE)
    store_selection(
        kept_ptr, weights_ptr, slots_ptr, is_kept, slot, weight, offs_n, mask_n, pid_b, N, K, 1
    )
    store_prefix(weights_ptr, slots_ptr, pid_b, N, 1)


def _score_reduce(tokens: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate and launch; a given row replaces the query and score kernels."""
    query, (keep, merge, scored, known) = _split_arguments(arguments)
    B, N, _ = tokens.shape
    tokens = launch.addressable(tokens)
    scored = tokens if scored is None else launch.addressable(scored)
    out, kept, weights, slots = empty_outputs(tokens, keep, 1, merge)
    row = tokens.new_empty(B, N, dtype=torch.float32) if known is None else _copy(known)
    selection, is_long = (kept, weights, slots), N - 1 > launch.MAX_SELECTED
    if known is None:
        u, cls_score, _ = launch_query(query, scored.dtype)
        parts = *score_tiles(scored, u, query.eps), cls_score
        _, H, T = parts[1].shape
        if is_long:
            launch_row(*parts, row)
        else:
            block_n, block_t, num_warps = launch.select(N - 1, T)
            launch.run(
                wrap_triton(_score_select_kernel),
                (B,),
                *(*parts, row, *selection, N, keep, H, T),
                MERGE=merge,
                BLOCK_N=block_n,
                BLOCK_T=block_t,
                BLOCK_H=launch.heads_a_step(block_n, block_t, num_warps),
                num_warps=num_warps,
            )
    if is_long or known is not None:
        launch_select(row[:, 1:], None, *selection, num_prefix_tokens=1, merge=merge)
    launch_move(tokens, out, weights, slots, merge=merge)
    return out, *selection, row


def _copy(row: Tensor) -> Tensor:
    """Return a contiguous copy of the row."""
    return row.clone(memory_format=torch.contiguous_format)


def _split_arguments(arguments: tuple[Any, ...]) -> tuple[QueryArguments, tuple[Any, ...]]:
    """Split the op's arguments after tokens into those of the query and the others."""
    count = len(QueryArguments._fields)
    return QueryArguments(*arguments[:count]), arguments[count:]


def _fake(tokens, *arguments):
    _, (keep, merge, scored, known) = _split_arguments(arguments)
    row = known
    if row is None:
        read = tokens if scored is None else scored
        row = tokens.new_empty(tokens.shape[:2], dtype=accumulator(read))
    outputs = empty_outputs(tokens, keep, 1, merge, weights=accumulator(tokens, row))
    return *outputs, torch.empty_like(row, memory_format=torch.contiguous_format)


def _unsupported(tokens: Tensor, *arguments: Any) -> str | None:
    """Return why the kernels do not support the arguments, or None."""
    query, (*_, scored, _) = _split_arguments(arguments)
    reason = absorbed_unsupported(tokens, *query)
    return reason if scored is None or reason is not None else launch.unsupported(scored)


def _save_for_backward(ctx, inputs, output) -> None:
    _, kept, weights, slots, row = output
    ctx.mark_non_differentiable(kept, weights, slots, row)
    ctx.save_for_backward(slots, weights)
    _, (_, ctx.merge, *_) = _split_arguments(inputs[1:])
    ctx.others = len(inputs) - 1


def _backward(ctx, grad_out, *_):
    grad = reduce_backward_op(grad_out, *ctx.saved_tensors, ctx.merge)
    return grad, *[None] * ctx.others


def _flops(tokens_shape, *shapes, **kwargs) -> int:
    """Return the FLOPs of the row, and 2 for each element of a dropped token that is merged."""
    _, (keep, merge, _, row) = _split_arguments(shapes)
    B, N, D = tokens_shape
    scored = absorbed_flops(tokens_shape, *shapes) if row is None else 0
    return scored + (2 * B * D * (N - 1 - keep) if merge else 0)


_score_reduce_op = Operator(
    "score_reduce",
    score_reduce_reference,
    launcher=_score_reduce,
    unsupported=_unsupported,
    fake=_fake,
    flops=_flops,
    backward=_backward,
    save=_save_for_backward,
)


@example_of(score_reduce)
def _example(sizes: Sizes) -> Arguments:
    return sizes.block() | {"keep": sizes.K, "return_info": True}
