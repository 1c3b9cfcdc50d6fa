"""The CLS token's attention output in a pre-norm block: no product with every token's key or value.

    z    = (x - mean) * rstd of the tokens, row 0 made from `cls`                        (B, N, D)
    u_h  = gamma * (W_k,h^T q_h) * scale,  q = W_q LN(cls) + b_q;   s_h(n) = u_h . z_n   (B, H, N)
    m_h  = sum_n softmax_n(s_h) z_n                                                      (B, H, D)
    o_h  = W_v,h (gamma * m_h + beta) + b_v,h                                            (B, H*d)

The op is m, in fp32; the projections around it see one token an image. The kernel reads x once,
tile by tile of whole tokens, with a running softmax that CLS begins:

    p_h(n) = exp(s_h(n) - top_h)                           top: the maximum so far, of CLS at first
    y_h    = p_h(cls) z_cls + sum_n p rstd x,  m_h = (y_h - mean of y_h) / (p_h(cls) + sum_n p)

so that x of two bytes enters both products as it is: s needs no mean, since u is centred, and what
y has of it is the same in all features, since z has none. There u and p rstd are split into rounded
+ rest of x's type; in fp32 x is centred first. No gradient: inference and scoring only. More than
16 heads read x once for each 16; features that do not fit registers take the PyTorch form.
Source: associativity, and the running softmax of Milakov and Gimelshein (2018).
"""

from typing import Any

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._autocast import no_autocast
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton
from elip_kernels.absorbed import accumulator, query_arguments, split
from elip_kernels.absorbed_query import QueryArguments, launch_query, takes_query
from elip_kernels.cls_attention import absorbed_flops, absorbed_reference, absorbed_refuses


def cls_attend_from_tokens(
    tokens: Tensor,
    cls: Tensor,
    *,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """The CLS token's attention output in a pre-norm block, before the output projection.

    Args:
        v_weight, v_bias: (H*d, D) and (H*d,) or None; the others as `cls_attention_from_tokens`.

    Returns:
        (B, H*d) in the dtype of `tokens`, without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight}
    biases = {"q_bias": q_bias, "v_bias": v_bias}
    query = query_arguments(tokens, cls, eps, num_heads, scale, norm, matrices, biases)
    with torch.no_grad(), no_autocast(tokens):
        mixed = _attend_op(tokens.detach(), *query)  # (B, H, D)
        if norm_weight is not None:
            mixed = mixed * norm_weight
        if norm_bias is not None:
            mixed = mixed + norm_bias
        value = v_weight.to(mixed.dtype).view(num_heads, -1, tokens.shape[2])
        out = torch.einsum("bhc,hdc->bhd", mixed, value).flatten(1)
        return (out if v_bias is None else out + v_bias).to(tokens.dtype)


@takes_query()
def attend_reference(tokens: Tensor, *query: Any) -> Tensor:
    """The specification: m (B, H, D) of the formula above."""
    normed, rows = absorbed_reference(tokens, *query)
    return torch.bmm(rows, normed)


@triton.jit
def _load_tile(tokens_ptr, first, N, D, stride_tn, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens `first`, .. of an image [BLOCK_N, BLOCK_D], zero beyond N and D."""
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    return tl.load(tokens_ptr + offs_n[:, None] * stride_tn + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _centred(x, D, BLOCK_D: tl.constexpr):
    """x less the mean of its rows, fp32, zero beyond D."""
    x = x.to(tl.float32)
    mean = tl.sum(x, 1) * (1.0 / D)
    return tl.where((tl.arange(0, BLOCK_D) < D)[None, :], x - mean[:, None], 0.0)


@triton.jit
def _slices(x, SLICES: tl.constexpr, WIDEN: tl.constexpr):
    """[R, D] -> [SLICES, R, D / SLICES]: a batch of products, a slice of the features a warp."""
    x = x.to(tl.float32) if WIDEN else x
    return tl.permute(tl.reshape(x, x.shape[0], SLICES, x.shape[1] // SLICES), 1, 0, 2)


@triton.jit
def _for_all(weight, SLICES: tl.constexpr, WIDEN: tl.constexpr):
    """[H, N] -> [SLICES, H, N]: the same weights for every slice of the features."""
    weight = weight.to(tl.float32) if WIDEN else weight
    return tl.broadcast_to(weight[None], SLICES, weight.shape[0], weight.shape[1])


@triton.jit
def _multiply(left, rest, right, acc, HAS_REST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + (left + rest) @ right, batched."""
    acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if HAS_REST:
        acc = tl.dot(rest, right, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["N"])
def _attend_kernel(
    tokens_ptr, query_ptr, cls_score_ptr, cls_ptr, out_ptr, stride_tb, stride_tn, N, D, H, eps,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One program per (image, BLOCK_H heads): tile by tile of whole tokens, the next under way."""
    pid_b = tl.program_id(0).to(tl.int64)
    tokens_ptr += pid_b * stride_tb
    query_ptr += pid_b * H * D
    out_ptr += pid_b * H * D
    offs_n = tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_u = (offs_h < H)[:, None] & mask_d[None, :]
    u = tl.load(query_ptr + offs_h[:, None] * D + offs_d[None, :], mask=mask_u, other=0.0)
    u, rest = split(u, tokens_ptr.dtype.element_ty)
    u, rest = _slices(u, SLICES, WIDEN), _slices(rest, SLICES, WIDEN)  # [S, H, D/S]
    # CLS comes first: weight 1, its z as it is
    cls = tl.load(cls_ptr + pid_b * D + offs_d, mask=mask_d, other=0.0)
    acc = tl.zeros([SLICES, BLOCK_H, BLOCK_D // SLICES], tl.float32)
    acc += _slices(cls[None, :], SLICES, WIDEN)
    top = tl.load(cls_score_ptr + pid_b * H + offs_h, mask=offs_h < H, other=0.0)  # [H]
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    x = _load_tile(tokens_ptr, 1, N, D, stride_tn, BLOCK_N, BLOCK_D)
    for n in range(1, N, BLOCK_N):
        mask_n = n + offs_n < N
        if HAS_REST:
            tile = _slices(x, SLICES, WIDEN)  # [S, N, D/S]
        centred = _centred(x, D, BLOCK_D)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / D) + eps)
        rstd = tl.where(mask_n, rstd, 0.0)  # of nothing it is infinite where eps is 0
        if not HAS_REST:
            tile = _slices(centred, SLICES, WIDEN)
        score = tl.zeros([SLICES, BLOCK_H, BLOCK_N], tl.float32)
        score = _multiply(u, rest, tl.trans(tile, 0, 2, 1), score, HAS_REST, PRECISION)
        x = _load_tile(tokens_ptr, n + BLOCK_N, N, D, stride_tn, BLOCK_N, BLOCK_D)
        score = tl.where(mask_n[None, :], tl.sum(score, 0) * rstd[None, :], float("-inf"))  # [H, N]
        above = tl.maximum(top, tl.max(score, 1))
        decay = tl.exp(top - above)
        top = above
        weight = tl.exp(score - top[:, None])
        total = total * decay + tl.sum(weight, 1)
        weight *= rstd[None, :]
        if x.dtype == tl.float16:  # a token without variance, whose z is 0: no infinity times 0
            weight = tl.minimum(weight, 65504.0)
        rounded = weight.to(x.dtype)
        beyond = _for_all((weight - rounded.to(tl.float32)).to(x.dtype), SLICES, WIDEN)
        rounded = _for_all(rounded, SLICES, WIDEN)
        acc = _multiply(rounded, beyond, tile, acc * decay[None, :, None], HAS_REST, PRECISION)
    mean = tl.sum(tl.sum(acc, 2), 0) / D  # [H]
    out = (acc - mean[None, :, None]) * (1.0 / total)[None, :, None]
    WIDTH: tl.constexpr = BLOCK_D // SLICES
    offs_d = tl.arange(0, SLICES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [S, D/S]
    mask = (offs_h < H)[None, :, None] & (offs_d < D)[:, None, :]
    tl.store(out_ptr + offs_h[None, :, None] * D + offs_d[:, None, :], out, mask=mask)


def _attend(tokens: Tensor, *query: Any) -> Tensor:
    """Allocate, read launch.py, launch."""
    (B, N, D), arguments = tokens.shape, QueryArguments(*query)
    H, tokens = arguments.num_heads, launch.addressable(tokens)
    out = tokens.new_empty(B, H, D, dtype=torch.float32)
    if B == 0:
        return out
    settings = launch.cls_attend(tokens)
    with launch.on_device(tokens):
        u, cls_score, cls = launch_query(arguments, normed=True)
        _attend_kernel[(B, triton.cdiv(H, settings["BLOCK_H"]))](
            *(tokens, u, cls_score, cls, out, *tokens.stride()[:2], N, D, H, arguments.eps),
            **settings,
            **launch.CODE,
        )
    return out


def _flops(tokens_shape, *shapes, **kwargs) -> int:
    """The query's, and 4 B H N D: scores and weighted sum."""
    B, N, D = tokens_shape
    H = QueryArguments(*shapes[: len(QueryArguments._fields)]).num_heads
    return absorbed_flops(tokens_shape, *shapes) + 2 * B * H * N * D


_attend_op = Operator(
    "cls_attend_from_tokens",
    attend_reference,
    launcher=_attend,
    refuses=lambda tokens, *query: (
        absorbed_refuses(tokens, *query, most=tokens.shape[1]) or launch.refuses_width(tokens)
    ),
    fake=lambda tokens, cls, *query: tokens.new_empty(
        tokens.shape[0], query[-2], tokens.shape[2], dtype=accumulator(tokens.dtype)
    ),
    flops=_flops,
)
