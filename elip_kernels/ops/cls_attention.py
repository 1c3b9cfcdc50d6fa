"""The attention row of the CLS token, or of another token, without an N x N map.

    generic:   a = mean_h softmax_n(scale * q_h . k_g,n), g = h // (H / G)
                                                                        q (B, H, d), k (B, G, N, d)
    absorbed:  z = (x - mean) * rstd of the tokens, row 0 made from `cls`;   q = W_q LN(cls) + b_q
               u_h = gamma * (W_k,h^T q_h) * scale;   s_h(n) = u_h . z_n                  (B, H, N)
               a = mean_h softmax_n(s_h)                                                  (B, N)

The terms of beta and of the key bias in s_h are equal for every n and cancel in the softmax. The
key projection is not applied to the N tokens: N*D*H multiply-adds instead of N*D*D. Rows are fp32
(fp64 for fp64 tokens). There is no gradient: a row selects tokens.
Source: ELIP, Eq. 2; the absorption is associativity of the matrix product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels._validate import (
    check_device,
    check_mask,
    check_scale,
    check_shape,
    check_tensor,
    message,
)
from elip_kernels.ops.absorbed import (
    STATS,
    launch_row,
    query_arguments,
    score_tiles,
)
from elip_kernels.ops.absorbed_query import (
    QueryArguments,
    absorbed_query,
    launch_query,
    with_query_signature,
)
from elip_kernels.ops.gather_ops import accumulator


def cls_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the attention row of one query: the mean over heads of its softmax over the keys.

    The query may be the CLS token, the last token of a text, or a text token that attends to an
    image. For a causal model, pass only the keys that the token attends to, or mask the others::

        row = elip_kernels.cls_attention(q[:, :, -1], k)  # the last token attends to all N
        row = elip_kernels.cls_attention(q[:, :, i], k[:, :, : i + 1])

    Source: ELIP, Eq. 2.

    Args:
        q: (B, H, d), fp32, bf16, fp16 or fp64.
        k: (B, G, N, d), same dtype and device. H is a multiple of G: query head h reads key head
            h // (H / G), as in `scaled_dot_product_attention(enable_gqa=True)`. Do not repeat keys.
        scale: factor of the scores; d ** -0.5 by default.
        mask: (B, N) bool, True = may be attended to. If none is True, the image's row is NaN.

    Returns:
        (B, N) fp32 (fp64 for fp64 inputs), without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    check_tensor("q", q, "(B, H, d)", 3)
    B, H, d = q.shape
    if H == 0 or d == 0:
        raise ValueError(message("q", "(B, H, d) with H and d at least 1", q))
    check_keys(k, q)
    check_mask(mask, (B, k.shape[2]), "q", q)
    return _cls_attention_op(q.detach(), k.detach(), mask, check_scale(scale, d))


def check_keys(k: Tensor, q: Tensor) -> None:
    """Check keys (B, G, N, d) against q (B, H, .., d): same dtype and device, G divides H."""
    check_tensor("k", k, "(B, G, N, d)", 4)
    B, H, d = q.shape[0], q.shape[1], q.shape[-1]
    check_shape("k", k, (B, *k.shape[1:3], d), "(B, G, N, d)")
    if k.shape[1] < 1 or H % k.shape[1]:
        raise ValueError(message("k", f"(B, G, N, d) with G a divisor of the {H} heads of q", k))
    check_device("k", k, "q", q)
    if k.dtype != q.dtype:
        raise TypeError(message("k", f"the dtype of q, {q.dtype}", k, "cast one of them"))


def cls_attention_from_tokens(
    tokens: Tensor,
    cls: Tensor,
    *,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """Return the CLS attention row of a pre-norm block from the tokens that enter the block.

    The result is that of `cls_attention`, without computing the keys of all tokens. Example::

        row = elip_kernels.cls_attention_from_tokens(
            tokens, tokens[:, 0], norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
            q_weight=q.weight, q_bias=q.bias, k_weight=k.weight, num_heads=12,
        )

    Source: ELIP, Eq. 2.

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64, before the block's norm. Row 0 is CLS; its
            content is replaced by `cls`. With values beyond 1e18 the norm overflows, and the row
            has NaN.
        cls: (B, D), the (fused) CLS token, before the norm.
        norm_weight: (D,), weight of the block's LayerNorm, or None.
        norm_bias: (D,), bias of the block's LayerNorm, or None.
        eps: epsilon of the LayerNorm.
        q_weight: (H*d, D), weight of the query projection, as in nn.Linear.
        q_bias: (H*d,), bias of the query projection, or None.
        k_weight: (H*d, D), weight of the key projection. Its bias does not change the row.
        num_heads: H.
        scale: factor of the scores; d ** -0.5 by default.

    Returns:
        (B, N) fp32 (fp64 for fp64 tokens), without gradient; column 0 is CLS.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight}
    biases = {"q_bias": q_bias}
    query = query_arguments(tokens, cls, eps, num_heads, scale, norm, matrices, biases)
    return _from_tokens_op(tokens.detach(), *query)


def cls_attention_reference(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute `cls_attention` in PyTorch."""
    (B, H, d), (_, G, N, _), dtype = q.shape, k.shape, accumulator(q)
    columns = q.to(dtype).reshape(B, G, H // G, d).mT
    scores = torch.matmul(k.to(dtype), columns).mT.reshape(B, H, N) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return scores.softmax(-1).mean(1)


def absorbed_reference(tokens: Tensor, *query: Any) -> tuple[Tensor, Tensor]:
    """Return z (B, N, D) and softmax rows (B, H, N) of QueryArguments, in PyTorch."""
    dtype, arguments = accumulator(tokens), QueryArguments(*query)
    u, cls = absorbed_query(dtype, arguments)
    normed = F.layer_norm(tokens.to(dtype), (tokens.shape[2],), eps=arguments.eps)
    normed[:, 0] = cls
    return normed, torch.bmm(u, normed.mT).softmax(-1)


@with_query_signature()
def from_tokens_reference(tokens: Tensor, *query: Any) -> Tensor:
    """Compute `cls_attention_from_tokens` in PyTorch; return (B, N)."""
    return absorbed_reference(tokens, *query)[1].mean(1)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=STATS)
def _keys_kernel(
    q_ptr, k_ptr, mask_ptr, scores_ptr, tops_ptr, totals_ptr, cls_score_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kn, stride_mb, scale, N, D,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Score keys for GROUP query heads, key 0 apart. Grid: (image, key head, tile of keys)."""
    scale = tl.cast(scale, tl.float32)
    pid_b = tl.program_id(0).to(tl.int64)
    pid_g = tl.program_id(1).to(tl.int64)
    pid_t = tl.program_id(2)
    offs_n = pid_t * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N - 1
    mask_d = offs_d < D
    q_ptr += pid_b * stride_qb + pid_g * GROUP * stride_qh
    k_ptr += pid_b * stride_kb + pid_g * stride_kh
    next_q = tl.load(q_ptr + offs_d, mask=mask_d, other=0.0)
    first = tl.load(k_ptr + offs_d, mask=pid_t * BLOCK_D + offs_d < D, other=0.0)
    k = tl.load(
        k_ptr + (1 + offs_n)[:, None] * stride_kn + offs_d[None, :],
        mask=mask_n[:, None] & mask_d[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_D]
    is_open = mask_n
    if HAS_MASK:
        mask_ptr += pid_b * stride_mb
        is_open = mask_n & (tl.load(mask_ptr + 1 + offs_n, mask=mask_n, other=0) != 0)
    for i in range(0, GROUP):
        head = (pid_b * tl.num_programs(1) + pid_g) * GROUP + i
        q = next_q.to(tl.float32) * scale
        q_ptr += stride_qh
        next_q = tl.load(q_ptr + offs_d, mask=mask_d & (i + 1 < GROUP), other=0.0)
        score = tl.where(is_open, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        top = tl.max(score, 0)
        total = tl.sum(tl.where(score != float("-inf"), tl.exp(score - top), 0.0), 0)
        tl.store(scores_ptr + head * (N - 1) + offs_n, score, mask=mask_n)
        tl.store(tops_ptr + head * tl.num_programs(2) + pid_t, top)
        tl.store(totals_ptr + head * tl.num_programs(2) + pid_t, total)
        if pid_t == 0:
            cls_score = tl.sum(first.to(tl.float32) * q, 0)
            if HAS_MASK:
                cls_score = tl.where(tl.load(mask_ptr) != 0, cls_score, float("-inf"))
            tl.store(cls_score_ptr + head, cls_score)


def _from_tokens(tokens: Tensor, *query: Any) -> Tensor:
    """Allocate and launch: u, the scores, the row."""
    B, N, _ = tokens.shape
    arguments, tokens = QueryArguments(*query), launch.addressable(tokens)
    out = tokens.new_empty(B, N, dtype=torch.float32)
    u, cls_score, _ = launch_query(arguments, tokens.dtype)
    launch_row(*score_tiles(tokens, u, arguments.eps), cls_score, out)
    return out


def _cls_attention(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Allocate and launch: the scores, the row."""
    (B, G, N, d), H = k.shape, q.shape[1]
    k, (q, mask) = launch.addressable(k), launch.dense_rows(q, mask)
    out = k.new_empty(B, N, dtype=torch.float32)
    if N == 0:
        return out
    T = max(1, launch.cdiv(N - 1, launch.KEYS))
    scores, cls_score = out.new_empty(B, H, N - 1), out.new_empty(B, H)
    tops, totals = out.new_empty(2, B, H, T)
    launch.run(
        wrap_triton(_keys_kernel),
        (B, G, T),
        *(q, k, mask, scores, tops, totals, cls_score, *q.stride()[:2], *k.stride()[:3]),
        *(0 if mask is None else mask.stride(0), scale, N, d),
        GROUP=H // G,
        HAS_MASK=mask is not None,
        BLOCK_N=launch.KEYS,
        BLOCK_D=launch.next_power_of_2(d),
        num_warps=4,
    )
    launch_row(scores, tops, totals, cls_score, out)
    return out


def _unsupported(q: Tensor, k: Tensor, *_: Any) -> str | None:
    """Return why the kernels do not support the arguments, or None."""
    if k.shape[3] > launch.MAX_KEY_CHANNELS:
        return f"the kernels support at most {launch.MAX_KEY_CHANNELS:,} channels per head"
    return launch.unsupported(q, k, candidates=k.shape[2] - 1)


def _flops(q_shape, k_shape, *args, **kwargs) -> int:
    """Return 2 B H N d."""
    (B, H, d), N = q_shape, k_shape[2]
    return 2 * B * H * N * d


def absorbed_flops(tokens_shape: tuple[int, ...], *shapes: Any) -> int:
    """Return 4 B D H d for the query, by two matrices, and 2 B H N D for the scores."""
    query = QueryArguments(*shapes[: len(QueryArguments._fields)])
    B, N, D = tokens_shape
    return 4 * B * D * query.q_weight[0] + 2 * B * query.num_heads * N * D


def absorbed_unsupported(tokens: Tensor, *query: Any, most: int | None = None) -> str | None:
    """Return why the kernels do not support the arguments of an absorbed op, or None."""
    arguments = QueryArguments(*query[: len(QueryArguments._fields)])
    candidates = tokens.shape[1] - 1
    if arguments.q_weight.shape[0] > launch.MAX_CHANNELS * arguments.num_heads:
        return f"the kernels support at most {launch.MAX_CHANNELS} channels per head"
    if arguments.num_heads > launch.MAX_HEADS:
        return f"the kernels support at most {launch.MAX_HEADS} heads"
    tensors = [t for t in query if isinstance(t, Tensor)]
    return launch.unsupported(tokens, *tensors, candidates=candidates, most=most)


_cls_attention_op = Operator(
    "cls_attention",
    cls_attention_reference,
    launcher=_cls_attention,
    unsupported=_unsupported,
    fake=lambda q, k, mask, scale: k.new_empty(k.shape[0], k.shape[2], dtype=accumulator(k)),
    flops=_flops,
)
_from_tokens_op = Operator(
    "cls_attention_from_tokens",
    from_tokens_reference,
    launcher=_from_tokens,
    unsupported=absorbed_unsupported,
    fake=lambda tokens, *query: tokens.new_empty(tokens.shape[:2], dtype=accumulator(tokens)),
    flops=lambda tokens_shape, *shapes, **kwargs: absorbed_flops(tokens_shape, *shapes),
)


@example_of(cls_attention)
def _example(sizes: Sizes) -> Arguments:
    H, d = sizes.H, sizes.D // sizes.H
    return {"q": sizes.images(H, d), "k": sizes.images(H, sizes.N, d)}


@example_of(cls_attention_from_tokens)
def _example_from_tokens(sizes: Sizes) -> Arguments:
    return sizes.block()
