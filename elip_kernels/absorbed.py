"""What the absorbed forms share: checks, the query u made from the CLS token alone, the row.

u_h = gamma * (W_k,h^T q_h) * scale,  q = W_q LN(cls) + b_q;  the score of a token is u_h . z_n

z has no mean, so u needs none: it is centred by centring the rows of W_k gamma, D x D numbers where
u has B H D. Its products follow `torch.set_float32_matmul_precision`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import launch
from elip_kernels._triton import tl, triton
from elip_kernels._validate import (
    check_device,
    check_heads,
    check_shape,
    check_tensor,
    check_tokens,
    message,
)


def check_absorbed(
    tokens: Tensor,
    cls: Tensor,
    eps: float,
    num_heads: int,
    scale: float | None,
    norm: dict[str, Tensor | None],
    matrices: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    *,
    least: int = 1,
) -> float:
    """Check the arguments of the absorbed forms -> scale; `least` tokens, CLS included."""
    check_tokens(tokens, least)
    B, _, D = tokens.shape
    check_tensor("cls", cls, "(B, D)", 2)
    check_shape("cls", cls, (B, D), "(B, D)")
    if not isinstance(eps, float):
        raise TypeError(message("eps", "a float, at least 0", eps))
    if not eps >= 0:
        raise ValueError(message("eps", "a float, at least 0", eps))
    check_tensor("q_weight", matrices["q_weight"], "(H*d, D)", 2)
    width = matrices["q_weight"].shape[0]
    check_heads(num_heads, width)
    expected = {name: ((width, D), "(H*d, D)") for name in matrices}
    expected |= {name: ((D,), "(D,)") for name in norm}
    expected |= {name: ((width,), "(H*d,)") for name in biases}
    for name, value in (matrices | norm | biases).items():
        if value is None and name not in matrices:
            continue
        shape, names = expected[name]
        check_tensor(name, value, names, len(shape))
        check_shape(name, value, shape, names)
    for name, value in ({"cls": cls} | matrices | norm | biases).items():
        if value is not None:
            check_device(name, value, "tokens", tokens)
    return check_scale(scale, width // num_heads)


def check_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or head_dim ** -0.5 for None."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(message("scale", "a float or None", scale))
    return float(scale)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def absorbed_query(
    cls: Tensor,
    norm: dict[str, Tensor | None],
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    """u (B, H, D) of the formula above, centred; of any strides, its features side by side."""
    (B, D), dtype = cls.shape, accumulator(cls.dtype)
    gamma, beta, q_bias = [None if t is None else t.to(dtype) for t in (*norm.values(), q_bias)]
    normed = F.layer_norm(cls.to(dtype), (D,), gamma, beta, eps)
    query = F.linear(normed, q_weight.to(dtype), q_bias) * scale
    key = (k_weight if gamma is None else k_weight * gamma).to(dtype)
    key = key - key.mean(1, keepdim=True)
    heads = (num_heads, q_weight.shape[0] // num_heads)
    return torch.einsum("bhd,hdc->bhc", query.view(B, *heads), key.view(*heads, D))


def absorbed_operands(
    tokens: Tensor, cls: Tensor, query: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """u as query + rest in the dtype of `tokens` (no rest for fp32), and CLS's scores (B, H)."""
    normed = F.layer_norm(cls.to(query.dtype), cls.shape[1:], eps=eps)
    cls_score = torch.bmm(query, normed[..., None])[..., 0].contiguous()
    if query.stride(2) != 1 or query.stride(1) * query.shape[1] >= 2**31:
        query = query.contiguous()
    if tokens.dtype == torch.float32:
        return query, None, cls_score
    rounded = query.to(tokens.dtype)
    return rounded, torch.sub(query, rounded, out=torch.empty_like(rounded)), cls_score


@triton.jit
def patch_scores(
    tokens_ptr, query_ptr, rest_ptr, stride_tn, stride_uh, offs_n, N, D, H, eps,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores u_h . z of an image's patches `offs_n`, counted from 0 -> [BLOCK_N, BLOCK_H] fp32.

    u is centred, so x enters as it is; what its rounding left of its sum takes the mean back out.
    Where x has two bytes, u comes as query + rest of that type: two products into one fp32
    accumulator. Moments are those of x - pivot, the mean of a token's first BLOCK_K: no further
    from its mean than sqrt(D / BLOCK_K) standard deviations, so that little cancels. The scores of
    fp32 are those of x - pivot too, and from fp16's the pivot is taken as they grow.
    """
    offs_h = tl.arange(0, BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    score = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    pivot = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    sum_u = tl.zeros([BLOCK_H], tl.float32)
    for k in range(0, D, BLOCK_K):
        mask_k = k + offs_k < D
        x = tl.load(
            tokens_ptr + (1 + offs_n)[:, None] * stride_tn + (k + offs_k)[None, :],
            mask=(offs_n < N - 1)[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        offs_u = offs_h[:, None] * stride_uh + (k + offs_k)[None, :]
        mask_u = (offs_h < H)[:, None] & mask_k[None, :]
        u = tl.load(query_ptr + offs_u, mask=mask_u, other=0.0)  # [BLOCK_H, BLOCK_K]
        wide = x.to(tl.float32)
        pivot = tl.where(k == 0, tl.sum(wide, 1) / tl.minimum(D, BLOCK_K), pivot)
        shifted = tl.where(mask_k[None, :], wide - pivot[:, None], 0.0)
        total += tl.sum(shifted, 1)
        squares += tl.sum(shifted * shifted, 1)
        left = x if HAS_REST else shifted
        left = left.to(tl.float32) if WIDEN else left
        right = u.to(tl.float32) if WIDEN else u
        whole = u.to(tl.float32)
        score = tl.dot(left, tl.trans(right), score, input_precision=PRECISION)
        if HAS_REST:
            rest = tl.load(rest_ptr + offs_u, mask=mask_u, other=0.0)
            whole += rest.to(tl.float32)
            rest = rest.to(tl.float32) if WIDEN else rest
            score = tl.dot(left, tl.trans(rest), score, input_precision=PRECISION)
        part_u = tl.sum(whole, 1)
        sum_u += part_u
        if tokens_ptr.dtype.element_ty == tl.float16:
            score -= pivot[:, None] * part_u[None, :]
    mean = total / D
    rstd = 1.0 / tl.sqrt(tl.maximum(squares / D - mean * mean, 0.0) + eps)
    if tokens_ptr.dtype.element_ty == tl.bfloat16:
        mean += pivot
    score -= mean[:, None] * sum_u[None, :]
    return score * rstd[:, None]


@triton.jit
def head_mean(score, mask_n, cls_score_ptr, H, BLOCK_H: tl.constexpr):
    """Scores [BLOCK_N, BLOCK_H] and those of CLS (H,) -> row (patches [BLOCK_N], CLS scalar)."""
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    score = tl.where(mask_n[:, None], score, float("-inf"))
    cls_score = tl.load(cls_score_ptr + offs_h, mask=mask_h, other=0.0)
    top = tl.maximum(tl.max(score, 0), cls_score)
    weight = tl.exp(score - top[None, :])
    cls_weight = tl.exp(cls_score - top)
    share = tl.where(mask_h, 1.0 / ((tl.sum(weight, 0) + cls_weight) * H), 0.0)
    return tl.sum(weight * share[None, :], 1), tl.sum(cls_weight * share, 0)


@triton.jit
def store_row(row_ptr, row, cls_row, offs_n, mask_n):
    """An image's row (N,), CLS first."""
    tl.store(row_ptr + 1 + offs_n, row, mask=mask_n)
    tl.store(row_ptr, cls_row)


@triton.jit
def absorbed_row(
    tokens_ptr, query_ptr, rest_ptr, cls_score_ptr, stride_tn, stride_uh, N, D, H, eps,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All of an image's patches in one program -> head mean of its softmax rows, as `head_mean`."""
    offs_n = tl.arange(0, BLOCK_N)
    score = patch_scores(
        tokens_ptr, query_ptr, rest_ptr, stride_tn, stride_uh, offs_n, N, D, H, eps,
        HAS_REST, WIDEN, PRECISION, BLOCK_N, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    return head_mean(score, offs_n < N - 1, cls_score_ptr, H, BLOCK_H)


@triton.jit(do_not_specialize=["N"])
def scores_kernel(
    tokens_ptr, query_ptr, rest_ptr, scores_ptr, tops_ptr, totals_ptr, stride_tb, stride_tn,
    stride_ub, stride_uh, N, D, H, eps,
    HAS_REST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per (image, tile of patches): their scores, and each head's maximum and sum."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_t = tl.program_id(1)
    offs_n = pid_t * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    mask_n = offs_n < N - 1
    mask_h = offs_h < H
    score = patch_scores(
        tokens_ptr + pid_b * stride_tb, query_ptr + pid_b * stride_ub, rest_ptr + pid_b * stride_ub,
        stride_tn, stride_uh, offs_n, N, D, H, eps,
        HAS_REST, WIDEN, PRECISION, BLOCK_N, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    score = tl.where(mask_n[:, None], score, float("-inf"))
    top = tl.max(score, 0)
    offs_t = (pid_b * H + offs_h) * tl.num_programs(1) + pid_t
    tl.store(tops_ptr + offs_t, top, mask=mask_h)
    tl.store(totals_ptr + offs_t, tl.sum(tl.exp(score - top[None, :]), 0), mask=mask_h)
    tl.store(
        scores_ptr + (pid_b * H + offs_h)[None, :] * (N - 1) + offs_n[:, None],
        score,
        mask=mask_n[:, None] & mask_h[None, :],
    )


@triton.jit
def row_of_scores(
    scores_ptr, tops_ptr, totals_ptr, cls_score_ptr, pid_b, N, H, T,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What `scores_kernel` wrote of T tiles -> (patches [BLOCK_N], CLS scalar), as `head_mean`."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T)
    mask_n = offs_n < N - 1
    mask_t = offs_t < T
    scores_ptr += pid_b * H * (N - 1)
    tops_ptr += pid_b * H * T
    totals_ptr += pid_b * H * T
    cls_score_ptr += pid_b * H
    row = tl.zeros([BLOCK_N], tl.float32)
    cls_row = 0.0
    for h in range(0, H):
        score = tl.load(scores_ptr + h * (N - 1) + offs_n, mask=mask_n, other=float("-inf"))
        tops = tl.load(tops_ptr + h * T + offs_t, mask=mask_t, other=float("-inf"))
        totals = tl.load(totals_ptr + h * T + offs_t, mask=mask_t, other=0.0)
        cls_score = tl.load(cls_score_ptr + h)
        top = tl.maximum(tl.max(tops, 0), cls_score)
        cls_weight = tl.exp(cls_score - top)
        share = 1.0 / ((tl.sum(totals * tl.exp(tops - top), 0) + cls_weight) * H)
        row += tl.exp(score - top) * share
        cls_row += cls_weight * share
    return row, cls_row


def score_tiles(
    tokens: Tensor, query: Tensor, rest: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `scores_kernel` -> scores (B, H, N-1), tops and totals (B, H, T) of the T tiles."""
    (B, N, D), H = tokens.shape, query.shape[1]
    settings = launch.score_tiles(H, tokens)
    T = triton.cdiv(N - 1, settings["BLOCK_N"])
    scores = tokens.new_empty(B, H, N - 1, dtype=torch.float32)
    tops, totals = scores.new_empty(2, B, H, T)
    scores_kernel[(B, T)](
        *(tokens, query, query if rest is None else rest, scores, tops, totals),
        *(*tokens.stride()[:2], *query.stride()[:2], N, D, H, eps),
        **settings,
    )
    return scores, tops, totals
