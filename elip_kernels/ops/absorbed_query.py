"""The query u, which absorbs the key projection of a block, from the CLS token: one kernel.

    c   = f x_cls + (1 - f) x_text  (Eq. 1); "match" first scales x_text to the norm of x_cls
    z   = (c - mean) * rstd                                                        (B, D)
    q   = (W_q (gamma z + beta) + b_q) * scale                                     (B, H, d)
    u_h = gamma * (W_k,h^T q_h), minus its mean                                    (B, H, D)
    s_h = u_h . z, the score of the CLS token                                      (B, H)

z has zero mean, so the mean of u does not change the scores. The mean of u_h is q_h . w_h, where w
is the mean over the columns of W_k gamma. The CLS score follows from q_h . (W_k,h (gamma z)). Both
are known before u, so W_q is read once and W_k twice for each sixteen images. W_q beta is summed
apart, so that both products of a step have the left factor gamma z. Nothing is cached between
calls, because the weights change during training.
Source: ELIP, Eq. 1-2; the absorption is associativity of the matrix product.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels.ops.fuse_text import LEAST_NORM, fuse

R = TypeVar("R", bound=Callable[..., Any])


class QueryArguments(NamedTuple):
    """Inputs of the query u, without gradient, in the order of the op schemas."""

    cls: Tensor
    text: Tensor | None
    fusion: float
    match: bool
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    num_heads: int
    scale: float


def with_query_signature(**others: Any) -> Callable[[R], R]:
    """Name each argument of (tokens, *query, *others), because `infer_schema` reads the names."""
    hints = {"tokens": Tensor} | QueryArguments.__annotations__ | others
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=hint) for name, hint in hints.items()]

    def sign(reference: R) -> R:
        reference.__signature__ = inspect.signature(reference).replace(parameters=named)
        return reference

    return sign


def absorbed_query(dtype: torch.dtype, query: QueryArguments) -> tuple[Tensor, Tensor]:
    """Return u (B, H, D), centred, and z (B, D), in `dtype` (reference implementation).

    This version centres the rows of W_k gamma, D x D numbers, instead of u. The products follow
    `torch.set_float32_matmul_precision`.
    """
    a = query
    cls = fuse(a.cls.to(dtype), a.text, a.fusion, a.match)
    (B, D), heads = cls.shape, (a.num_heads, a.q_weight.shape[0] // a.num_heads)
    vectors = (a.norm_weight, a.norm_bias, a.q_bias)
    gamma, beta, bias = (None if t is None else t.to(dtype) for t in vectors)
    q = F.linear(F.layer_norm(cls, (D,), gamma, beta, a.eps), a.q_weight.to(dtype), bias) * a.scale
    key = (a.k_weight if gamma is None else a.k_weight * gamma).to(dtype)
    key = key - key.mean(1, keepdim=True)
    u = torch.einsum("bhd,hdc->bhc", q.view(B, *heads), key.view(*heads, D))
    return u, F.layer_norm(cls, (D,), eps=a.eps)


@triton.jit
def _load_cls(cls_ptr, text_ptr, offs_c, offs_t, mask, f_cls, f_text, HAS_TEXT: tl.constexpr):
    """Load a slice of c in fp32 [BLOCK_B, features]."""
    cls = tl.load(cls_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    if HAS_TEXT:
        text = tl.load(text_ptr + offs_t, mask=mask, other=0.0).to(tl.float32)
        cls = cls * f_cls[:, None] + text * f_text[:, None]
    return cls


@triton.jit
def _fused_moments(
    cls_ptr, text_ptr, row_c, row_t, mask_b, D, fusion, eps, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr, HAS_TEXT: tl.constexpr, MATCH: tl.constexpr, LEAST_NORM: tl.constexpr,
):  # fmt: skip
    """Return the factors of CLS and of the text in c, its mean and its rstd, all [BLOCK_B]."""
    fusion = tl.cast(fusion, tl.float32)
    f_cls = tl.full([BLOCK_B], 1.0, tl.float32)
    f_text = tl.zeros([BLOCK_B], tl.float32)
    sum_cls = tl.zeros([BLOCK_B], tl.float32)
    sum_text = tl.zeros([BLOCK_B], tl.float32)
    is_text = tl.zeros([BLOCK_B], tl.int32)
    norm_cls = tl.zeros([BLOCK_B], tl.float32)
    norm_text = tl.zeros([BLOCK_B], tl.float32)
    for d in tl.range(0, D, BLOCK_R, num_stages=3):
        offs = (d + tl.arange(0, BLOCK_R))[None, :]
        mask = mask_b[:, None] & (offs < D)
        cls = tl.load(cls_ptr + row_c + offs, mask=mask, other=0.0).to(tl.float32)
        sum_cls += tl.sum(cls, 1)
        if HAS_TEXT:
            text = tl.load(text_ptr + row_t + offs, mask=mask, other=0.0).to(tl.float32)
            sum_text += tl.sum(text, 1)
            is_text = tl.maximum(is_text, tl.max((text != 0).to(tl.int32), 1))
            if MATCH:
                norm_cls += tl.sum(cls * cls, 1)
                norm_text += tl.sum(text * text, 1)
    if HAS_TEXT:
        f_cls = tl.where(is_text == 1, fusion, 1.0)
        f_text = tl.where(is_text == 1, 1.0 - fusion, 0.0)
        if MATCH:
            f_text *= tl.sqrt(norm_cls) / tl.maximum(tl.sqrt(norm_text), LEAST_NORM)
    mean = (f_cls * sum_cls + f_text * sum_text) / D
    squares = tl.zeros([BLOCK_B], tl.float32)
    for d in tl.range(0, D, BLOCK_R, num_stages=3):  # the second read of c hits the cache
        offs = (d + tl.arange(0, BLOCK_R))[None, :]
        mask = mask_b[:, None] & (offs < D)
        c = _load_cls(cls_ptr, text_ptr, row_c + offs, row_t + offs, mask, f_cls, f_text, HAS_TEXT)
        c = tl.where(mask, c - mean[:, None], 0.0)
        squares += tl.sum(c * c, 1)
    return f_cls, f_text, mean, 1.0 / tl.sqrt(squares / D + tl.cast(eps, tl.float32))


@triton.jit
def load_vector(ptr, offs, mask, OTHER: tl.constexpr):
    """Load a slice of a parameter vector in fp32; fill with OTHER if the pointer is None."""
    if ptr is None:
        values = tl.full([offs.shape[0]], OTHER, tl.float32)
    else:
        values = tl.load(ptr + offs, mask=mask, other=OTHER).to(tl.float32)
    return values


@triton.jit
def load_matrix(rows_ptr, d, mask_w, D, BLOCK_D: tl.constexpr):
    """Load features d, d+1, .. of the rows of a head [BLOCK_W, BLOCK_D]; zero beyond D."""
    offs = d + tl.arange(0, BLOCK_D)
    return tl.load(rows_ptr + offs[None, :], mask=mask_w[:, None] & (offs < D)[None, :], other=0.0)


@triton.jit
def part_sums(w, factor, PARTS: tl.constexpr):
    """Return the sums of w * factor [rows, columns] over each part of a row [rows, PARTS]."""
    product = w.to(tl.float32) * factor
    return tl.sum(tl.reshape(product, [w.shape[0], PARTS, w.shape[1] // PARTS]), 2)


@triton.jit
def add_product(x, w, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + x @ w for fp32 x; with TERMS, x is that many terms of a two-byte w's type."""
    if TERMS and w.dtype != tl.float32:
        for _ in tl.static_range(TERMS):
            term = x.to(w.dtype)
            acc = tl.dot(term, w, acc)
            x -= term.to(tl.float32)
    else:
        acc = tl.dot(x, w.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def split(x, dtype: tl.constexpr):
    """Return fp32 x as rounded + rest, both of a smaller dtype; for fp32 the rest is 0."""
    rounded = x.to(dtype)
    return rounded, (x - rounded.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["B"])
def _query_kernel(
    cls_ptr, text_ptr, norm_weight_ptr, norm_bias_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr,
    query_ptr, cls_score_ptr, normed_ptr, stride_cb, stride_tb, stride_q, stride_k,
    B, D, H, W, fusion, scale, eps,
    HAS_TEXT: tl.constexpr, MATCH: tl.constexpr, LEAST_NORM: tl.constexpr,
    ROWS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute u, the CLS score and z. Grid: (BLOCK_B images, head of W channels)."""
    scale = tl.cast(scale, tl.float32)
    pid_h = tl.program_id(1)
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b, mask_w = offs_b < B, tl.arange(0, BLOCK_W) < W
    image = offs_b.to(tl.int64)[:, None]
    row_c, row_t, row_z = image * stride_cb, image * stride_tb, image * D
    channel = pid_h * W + tl.arange(0, BLOCK_W)
    q_rows = q_weight_ptr + channel[:, None] * stride_q
    k_rows = k_weight_ptr + channel[:, None] * stride_k
    f_cls, f_text, mean, rstd = _fused_moments(
        cls_ptr, text_ptr, row_c, row_t, mask_b, D, fusion, eps,
        BLOCK_B, BLOCK_R, HAS_TEXT, MATCH, LEAST_NORM,
    )  # fmt: skip
    mask_z = (offs_b < tl.where(pid_h == 0, B, 0))[:, None]  # all heads have the same z
    q = tl.zeros([BLOCK_B, BLOCK_W], tl.float32)  # without beta and bias, as key
    key = tl.zeros([BLOCK_B, BLOCK_W], tl.float32)
    K_PARTS: tl.constexpr = BLOCK_D * k_weight_ptr.dtype.element_ty.primitive_bitwidth // 128
    Q_PARTS: tl.constexpr = BLOCK_D * q_weight_ptr.dtype.element_ty.primitive_bitwidth // 128
    key_gamma = tl.zeros([BLOCK_W, K_PARTS], tl.float32)  # a thread loads a part, 16 bytes, of W
    q_beta = tl.zeros([BLOCK_W, Q_PARTS], tl.float32)
    all_z = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        offs_d = d + tl.arange(0, BLOCK_D)
        offs, mask = offs_d[None, :], mask_b[:, None] & (offs_d < D)[None, :]
        c = _load_cls(cls_ptr, text_ptr, row_c + offs, row_t + offs, mask, f_cls, f_text, HAS_TEXT)
        z = tl.where(mask, (c - mean[:, None]) * rstd[:, None], 0.0)
        if normed_ptr is not None:
            tl.store(normed_ptr + row_z + offs, z, mask=mask & mask_z)
        all_z += z
        gamma = load_vector(norm_weight_ptr, offs_d, offs_d < D, 1.0)[None, :]
        beta = load_vector(norm_bias_ptr, offs_d, offs_d < D, 0.0)[None, :]
        k_slice = load_matrix(k_rows, d, mask_w, D, BLOCK_D)
        q_slice = load_matrix(q_rows, d, mask_w, D, BLOCK_D)
        key_gamma += part_sums(k_slice, gamma, K_PARTS)
        if norm_bias_ptr is not None:
            q_beta += part_sums(q_slice, beta, Q_PARTS)
        z *= gamma
        key = add_product(z, tl.trans(k_slice), key, TERMS, PRECISION)
        q = add_product(z, tl.trans(q_slice), q, TERMS, PRECISION)
    q += (tl.sum(q_beta, 1) + load_vector(q_bias_ptr, channel, mask_w, 0.0))[None, :]
    mean_u = scale * tl.sum(q * (tl.sum(key_gamma, 1) / D)[None, :], 1)  # [BLOCK_B]
    score = scale * tl.sum(q * key, 1) - mean_u * tl.sum(all_z, 1)
    tl.store(cls_score_ptr + offs_b.to(tl.int64) * H + pid_h, score, mask=mask_b)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        offs_d = d + tl.arange(0, BLOCK_D)
        k_slice = load_matrix(k_rows, d, mask_w, D, BLOCK_D)
        gamma = load_vector(norm_weight_ptr, offs_d, offs_d < D, 1.0)[None, :]
        u = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        u = add_product(q, k_slice, u, TERMS, PRECISION) * (scale * gamma) - mean_u[:, None]
        at = query_ptr + (image * H + pid_h) * ROWS * D + offs_d[None, :]
        mask = mask_b[:, None] & (offs_d < D)[None, :]
        rounded, rest = split(u, at.dtype.element_ty)
        tl.store(at, rounded, mask=mask)
        if ROWS == 2:
            tl.store(at + D, rest, mask=mask)


def launch_query(
    arguments: QueryArguments, dtype: torch.dtype, *, normed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Allocate and launch; return u, CLS scores (B, H) and z (B, D) or None, both fp32.

    u is (B, H, 1, D) for an fp32 `dtype`, that of the patches, else (B, H, 2, D): rounded to
    `dtype`, and the rest.
    """
    a = arguments
    (B, D), H, W = a.cls.shape, a.num_heads, a.q_weight.shape[0] // a.num_heads
    query = a.cls.new_empty(B, H, 1 if dtype == torch.float32 else 2, D, dtype=dtype)
    cls_score = a.cls.new_empty(B, H, dtype=torch.float32)
    z = cls_score.new_empty(B, D) if normed else None
    text = None if a.fusion == 1.0 else a.text
    cls, text, q_weight, k_weight = launch.dense_rows(a.cls, text, a.q_weight, a.k_weight)
    gamma, beta, bias = launch.contiguous(a.norm_weight, a.norm_bias, a.q_bias)
    text_stride = 0 if text is None or text.shape[0] == 1 else text.stride(0)
    settings = launch.query(W, dtype, cls, text, q_weight, k_weight)
    launch.run(
        wrap_triton(_query_kernel),
        (launch.cdiv(B, settings["BLOCK_B"]), H),
        *(cls, text, gamma, beta, q_weight, bias, k_weight, query, cls_score, z),
        *(cls.stride(0), text_stride, q_weight.stride(0), k_weight.stride(0)),
        *(B, D, H, W, a.fusion, a.scale, a.eps),
        HAS_TEXT=text is not None,
        MATCH=a.match,
        LEAST_NORM=LEAST_NORM,
        ROWS=query.shape[2],
        **settings,
    )
    return query, cls_score, z
