"""Attention output of the CLS token in a pre-norm block, without projecting all keys and values.

    z    = (x - mean) * rstd of the tokens, row 0 made from `cls`                        (B, N, D)
    u_h  = gamma * (W_k,h^T q_h) * scale,  q = W_q LN(cls) + b_q;   s_h(n) = u_h . z_n   (B, H, N)
    m_h  = sum_n softmax_n(s_h) z_n                                                      (B, H, D)
    o_h  = W_v,h (gamma * m_h + beta) + b_v,h                                            (B, H*d)

m and o are fp32 until o is stored. The weights kernel reads a tile of patches over all features,
for all heads, as `scores_kernel` does. For each tile it stores

    top_h = max_n s_h(n),  total_h = sum_n exp(s_h(n) - top_h)                     (B, T, H)
    w_h(n) = exp(s_h(n) - top_h) rstd_n,  shift_h = sum_n w_h(n) mean_n

The weigh kernel combines top and total of all tiles and of CLS, and sums a slice of the features:

    y_h = exp(s_h(cls) - top) z_cls + sum_tiles exp(top_h - top) (sum_n w_h(n) x_n - shift_h)
    m_h = y_h / total

The value kernel multiplies m_h by the rows of W_v, which it reads once for each sixteen images. Any
width D is supported, and few images are enough to fill a GPU. x is read twice; the second pass
starts with the last image, whose tokens may still be in L2. Two-byte x enters both products
unchanged: u and w are split into rounded + rest of its type. fp32 x is centred first. The result of
an image does not depend on the batch. There is no gradient: inference and scoring only.
Source: associativity, and the online softmax of Milakov and Gimelshein (2018).
"""

from typing import Any

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels.ops.absorbed import STATS, patch_scores, query_arguments
from elip_kernels.ops.absorbed_query import (
    QueryArguments,
    add_product,
    launch_query,
    load_matrix,
    load_vector,
    split,
    with_query_signature,
)
from elip_kernels.ops.cls_attention import absorbed_flops, absorbed_reference, absorbed_unsupported
from elip_kernels.ops.select_device import part_and_slice


def cls_attention_output(
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
    """Return the CLS token's attention output in a pre-norm block, before the output projection.

    The result equals row 0 of the block's attention, without an N x D x D product. Example::

        out = elip_kernels.cls_attention_output(
            tokens, tokens[:, 0], norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
            q_weight=q.weight, q_bias=q.bias, k_weight=k.weight,
            v_weight=v.weight, v_bias=v.bias, num_heads=12,
        )

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64, before the block's norm. Row 0 is CLS; its
            content is replaced by `cls`.
        cls: (B, D), the CLS token, before the norm.
        norm_weight: (D,), weight of the block's LayerNorm, or None.
        norm_bias: (D,), bias of the block's LayerNorm, or None.
        eps: epsilon of the LayerNorm.
        q_weight: (H*d, D), weight of the query projection, as in nn.Linear.
        q_bias: (H*d,), bias of the query projection, or None.
        k_weight: (H*d, D), weight of the key projection. Its bias does not change the output.
        v_weight: (H*d, D), weight of the value projection.
        v_bias: (H*d,), bias of the value projection, or None.
        num_heads: H.
        scale: factor of the scores; d ** -0.5 by default.

    Returns:
        (B, H*d) in the dtype of `tokens`, without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight}
    biases = {"q_bias": q_bias, "v_bias": v_bias}
    query = query_arguments(tokens, cls, eps, num_heads, scale, norm, matrices, biases)
    bias = v_bias if v_bias is None else v_bias.detach()
    return _cls_attention_output_op(tokens.detach(), *query, v_weight.detach(), bias)


def means_reference(tokens: Tensor, query: QueryArguments) -> Tensor:
    """Compute m (B, H, D) in PyTorch, in fp32 or fp64."""
    normed, rows = absorbed_reference(tokens, *query)
    return torch.bmm(rows, normed)


@with_query_signature(v_weight=Tensor, v_bias=Tensor | None)
def cls_attention_output_reference(tokens: Tensor, *arguments: Any) -> Tensor:
    """Compute o (B, H*d) in PyTorch."""
    *query, v_weight, v_bias = arguments
    query = QueryArguments(*query)
    means = means_reference(tokens, query)
    gamma, beta, bias = (
        t if t is None else t.to(means.dtype) for t in (query.norm_weight, query.norm_bias, v_bias)
    )
    means = means if gamma is None else means * gamma
    means = means if beta is None else means + beta
    value = v_weight.to(means.dtype).view(query.num_heads, -1, tokens.shape[2])
    out = torch.einsum("bhc,hdc->bhd", means, value).flatten(1)
    return (out if bias is None else out + bias).to(tokens.dtype)


@triton.jit(do_not_specialize=["N", "T"], do_not_specialize_on_alignment=STATS)
def _weights_kernel(
    tokens_ptr, query_ptr, weights_ptr, rests_ptr, tops_ptr, totals_ptr, shifts_ptr, means_ptr,
    stride_tb, stride_tn, N, D, H, T, eps,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store w of all heads and the statistics of a tile. Grid: (image and tile of patches)."""
    tile = tl.program_id(0).to(tl.int64)
    pid_b, pid_t = tile // T, tl.program_id(0) % T
    offs_n = pid_t * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    mask_n, mask_h = offs_n < N - 1, offs_h < H
    score, mean, rstd = patch_scores(
        tokens_ptr, query_ptr, pid_b, stride_tb, stride_tn, offs_n, N, D, H, eps,
        HAS_REST, WIDEN, PRECISION, BLOCK_N, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    score = tl.where(mask_n[:, None], score, float("-inf"))
    top = tl.max(score, 0)
    weight = tl.exp(score - top[None, :])  # [BLOCK_N, BLOCK_H]
    tl.store(tops_ptr + tile * H + offs_h, top, mask=mask_h)
    tl.store(totals_ptr + tile * H + offs_h, tl.sum(weight, 0), mask=mask_h)
    weight *= tl.where(mask_n, rstd, 0.0)[:, None]  # rstd of padding is infinite if eps is 0
    if tokens_ptr.dtype.element_ty == tl.float16:  # avoids inf * 0 for a constant token
        weight = tl.minimum(weight, 65504.0)
    rounded, rest = split(weight, tokens_ptr.dtype.element_ty)
    at = (tile * H + offs_h)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tl.store(weights_ptr + at, rounded, mask=mask_h[None, :])
    if HAS_REST:
        tl.store(rests_ptr + at, rest, mask=mask_h[None, :])
        shift = (rounded.to(tl.float32) + rest.to(tl.float32)) * mean[:, None]
        tl.store(shifts_ptr + tile * H + offs_h, tl.sum(shift, 0), mask=mask_h)
    else:
        tl.store(means_ptr + pid_b * (N - 1) + offs_n, mean, mask=mask_n)


@triton.jit
def _all_tiles(
    tops_ptr, totals_ptr, shifts_ptr, cls_score, offs_h, H, T,
    HAS_REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Return top, total and shift [BLOCK_H] over all tiles of an image and CLS."""
    offs_t = tl.arange(0, BLOCK_T)
    top, total = cls_score, tl.full([BLOCK_H], 1.0, tl.float32)
    shift = tl.zeros([BLOCK_H], tl.float32)
    for t in range(0, T, BLOCK_T):
        at = (t + offs_t)[:, None] * H + offs_h[None, :]
        mask = (t + offs_t < T)[:, None] & (offs_h < H)[None, :]
        tops = tl.load(tops_ptr + at, mask=mask, other=float("-inf"))
        totals = tl.load(totals_ptr + at, mask=mask, other=0.0)
        if HAS_REST:
            shifts = tl.load(shifts_ptr + at, mask=mask, other=0.0)
        above = tl.maximum(top, tl.max(tops, 0))
        decay, share = tl.exp(top - above), tl.exp(tops - above[None, :])
        total = total * decay + tl.sum(totals * share, 0)
        if HAS_REST:
            shift = shift * decay + tl.sum(shifts * share, 0)
        top = above
    return top, total, shift


@triton.jit
def _dot_split(weight, rest, x, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """Return (weight + rest) @ x in fp32."""
    if WIDEN:
        weight, rest, x = weight.to(tl.float32), rest.to(tl.float32), x.to(tl.float32)
    acc = tl.dot(weight, x, input_precision=PRECISION)
    return tl.dot(rest, x, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["N", "T", "TILES"], do_not_specialize_on_alignment=STATS)
def _weigh_kernel(
    tokens_ptr, weights_ptr, rests_ptr, tops_ptr, totals_ptr, shifts_ptr, means_ptr,
    cls_score_ptr, cls_ptr, out_ptr, stride_tb, stride_tn, N, D, H, T, TILES,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum weighted tokens into m. Grid: (slice of D of an image, TILES tiles, BLOCK_H heads)."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the images read last are in L2
    pid_b, pid_d = part_and_slice(pid, D, BLOCK_D)
    pid_b, pid_p = pid_b.to(tl.int64), tl.program_id(1)
    offs_n = tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_h, mask_d = offs_h < H, offs_d < D
    tokens_ptr += pid_b * stride_tb + stride_tn
    weights_ptr += pid_b * T * H * BLOCK_N
    tops_ptr += pid_b * T * H
    if HAS_REST:
        rests_ptr += pid_b * T * H * BLOCK_N
        shifts_ptr += pid_b * T * H
    else:
        means_ptr += pid_b * (N - 1)
    cls_score = tl.load(cls_score_ptr + pid_b * H + offs_h, mask=mask_h, other=0.0)
    # The first part adds CLS and subtracts the shift.
    mask_cls = offs_d < tl.where(pid_p == 0, D, 0)
    cls = tl.load(cls_ptr + pid_b * D + offs_d, mask=mask_cls, other=0.0)
    first = pid_p * TILES
    last = tl.minimum(first + TILES, T)
    mask_top = offs_h < tl.where(first < last, H, 0)
    tile_top = tl.load(tops_ptr + first * H + offs_h, mask=mask_top, other=0.0)
    top, total, shift = _all_tiles(
        tops_ptr, totals_ptr + pid_b * T * H, shifts_ptr, cls_score, offs_h, H, T,
        HAS_REST, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    acc = tl.exp(cls_score - top)[:, None] * cls[None, :]
    acc -= tl.where(pid_p == 0, shift, 0.0)[:, None]
    for t in range(first, last):
        at = t * BLOCK_N + offs_n
        x = tl.load(
            tokens_ptr + at[:, None] * stride_tn + offs_d[None, :],
            mask=(at < N - 1)[:, None] & mask_d[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        at_w = (t * H + offs_h)[:, None] * BLOCK_N + offs_n[None, :]
        weight = tl.load(weights_ptr + at_w, mask=mask_h[:, None], other=0.0)  # [BLOCK_H, BLOCK_N]
        if HAS_REST:
            rest = tl.load(rests_ptr + at_w, mask=mask_h[:, None], other=0.0)
        else:
            mean = tl.load(means_ptr + at, mask=at < N - 1, other=0.0)
        mask_top = offs_h < tl.where(t + 1 < last, H, 0)
        next_top = tl.load(tops_ptr + (t + 1) * H + offs_h, mask=mask_top, other=0.0)
        if HAS_REST:
            part = _dot_split(weight, rest, x, WIDEN, PRECISION)
        else:
            part = tl.dot(weight, x - mean[:, None], input_precision=PRECISION)
        acc += part * tl.exp(tile_top - top)[:, None]
        tile_top = next_top
    out_ptr += (pid_b * tl.num_programs(1) + pid_p) * H * D
    at = offs_h[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + at, acc * (1.0 / total)[:, None], mask=mask_h[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["B", "P"])
def _value_kernel(
    means_ptr, norm_weight_ptr, norm_bias_ptr, v_weight_ptr, v_bias_ptr, out_ptr, stride_v,
    B, P, D, H, W,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Multiply m, the sum of P parts, by W_v. Grid: (BLOCK_B images, head of W channels)."""
    pid_h = tl.program_id(1)
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_w = tl.arange(0, BLOCK_W)
    mask_b, mask_w = offs_b < B, offs_w < W
    image, channel = offs_b.to(tl.int64)[:, None], pid_h * W + offs_w
    v_rows = v_weight_ptr + channel[:, None] * stride_v
    slices = tl.cdiv(D, BLOCK_D)
    out = tl.zeros([BLOCK_B, BLOCK_W], tl.float32)
    for step in tl.range(0, P * slices, num_stages=STAGES):
        part, d = step // slices, step % slices * BLOCK_D
        offs_d = d + tl.arange(0, BLOCK_D)
        row = ((image * P + part) * H + pid_h) * D
        mask = mask_b[:, None] & (offs_d < D)[None, :]
        mean = tl.load(means_ptr + row + offs_d[None, :], mask=mask, other=0.0)
        mean *= load_vector(norm_weight_ptr, offs_d, offs_d < D, 1.0)[None, :]
        once = offs_d < tl.where(part == 0, D, 0)
        mean += load_vector(norm_bias_ptr, offs_d, once, 0.0)[None, :]
        value = load_matrix(v_rows, d, mask_w, D, BLOCK_D)
        out = add_product(mean, tl.trans(value), out, TERMS, PRECISION)
    out += load_vector(v_bias_ptr, channel, mask_w, 0.0)[None, :]
    tl.store(out_ptr + image * (H * W) + channel[None, :], out, mask_b[:, None] & mask_w[None, :])


def _weights(tokens: Tensor, query: Tensor, eps: float) -> tuple[Tensor | None, ...]:
    """Allocate and launch `_weights_kernel`; return what it stores.

    weights and rests (B, T, H, BLOCK_N); tops, totals and shifts (B, T, H); means (B, N-1). rests
    and shifts are None for fp32, means is None for other dtypes.
    """
    (B, N, D), H = tokens.shape, query.shape[1]
    settings = launch.weight_tiles(H, tokens)
    T, wide = launch.cdiv(N - 1, settings["BLOCK_N"]), tokens.dtype == torch.float32
    weights = tokens.new_empty(1 if wide else 2, B, T, H, settings["BLOCK_N"])
    stats = tokens.new_empty(2 if wide else 3, B, T, H, dtype=torch.float32)
    rests, shifts = (None, None) if wide else (weights[1], stats[2])
    means = tokens.new_empty(B, N - 1) if wide else None
    left = weights[0], rests, stats[0], stats[1], shifts, means
    launch.run(
        wrap_triton(_weights_kernel),
        (B * T,),
        *(tokens, query, *left, *tokens.stride()[:2], N, D, H, T, eps),
        **settings,
    )
    return left


def weighted_means(tokens: Tensor, query: QueryArguments) -> Tensor:
    """Allocate and launch: u, the weights, their sums; return m in parts (B, P, H, D)."""
    (B, N, D), H, tokens = tokens.shape, query.num_heads, launch.addressable(tokens)
    parts = max(1, launch.cdiv(N - 1, launch.PART))
    means = tokens.new_empty(B, parts, H, D, dtype=torch.float32)
    settings = launch.weigh(tokens)
    grid = (B * launch.cdiv(D, settings["BLOCK_D"]), parts, launch.cdiv(H, settings["BLOCK_H"]))
    u, cls_score, cls = launch_query(query, tokens.dtype, normed=True)
    weights, *others = _weights(tokens, u, query.eps)
    T, block_n = weights.shape[1], weights.shape[3]
    launch.run(
        wrap_triton(_weigh_kernel),
        grid,
        *(tokens, weights, *others, cls_score, cls, means, *tokens.stride()[:2]),
        *(N, D, H, T, launch.cdiv(T, parts)),
        BLOCK_N=block_n,
        **settings,
    )
    return means


def _values(
    means: Tensor, query: QueryArguments, v_weight: Tensor, v_bias: Tensor | None, out: Tensor
) -> None:
    """Launch `_value_kernel`, which writes o to `out` (B, H*d)."""
    (B, P, H, D), W = means.shape, v_weight.shape[0] // query.num_heads
    (v_weight,) = launch.dense_rows(v_weight)
    gamma, beta, bias = launch.contiguous(query.norm_weight, query.norm_bias, v_bias)
    settings = launch.value(W, out.dtype, v_weight)
    launch.run(
        wrap_triton(_value_kernel),
        (launch.cdiv(B, settings["BLOCK_B"]), H),
        *(means, gamma, beta, v_weight, bias, out, v_weight.stride(0), B, P, D, H, W),
        **settings,
    )


def _cls_attention_output(tokens: Tensor, *arguments: Any) -> Tensor:
    """Allocate and launch: m, then o."""
    *query, v_weight, v_bias = arguments
    query = QueryArguments(*query)
    out = tokens.new_empty(tokens.shape[0], v_weight.shape[0])
    _values(weighted_means(tokens, query), query, v_weight, v_bias, out)
    return out


def _flops(tokens_shape, *shapes, **kwargs) -> int:
    """Return the FLOPs of the query, 4 B H N D for scores and sums, and 2 B D H d for values."""
    *query, v_weight, _ = shapes
    B, N, D = tokens_shape
    sums = B * QueryArguments(*query).num_heads * N * D
    return absorbed_flops(tokens_shape, *query) + 2 * sums + 2 * B * D * v_weight[0]


_cls_attention_output_op = Operator(
    "cls_attention_output",
    cls_attention_output_reference,
    launcher=_cls_attention_output,
    unsupported=lambda tokens, *query: absorbed_unsupported(tokens, *query, most=tokens.shape[1]),
    fake=lambda tokens, *arguments: tokens.new_empty(tokens.shape[0], arguments[-2].shape[0]),
    flops=_flops,
)


@example_of(cls_attention_output)
def _example(sizes: Sizes) -> Arguments:
    value = {"v_weight": torch.randn(sizes.D, sizes.D) / sizes.D**0.5}
    value |= {"v_bias": torch.randn(sizes.D)}
    return sizes.block() | {name: tensor.to(sizes.dtype) for name, tensor in value.items()}
