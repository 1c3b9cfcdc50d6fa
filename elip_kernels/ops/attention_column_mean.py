"""Mean attention that each token receives: column means of softmax(q k^T), without an N x N map.

    s_h,m,n = scale * q_h,m . k_g,n of open keys, g = h // (H / G)   q (B, H, M, d), k (B, G, N, d)
    lse_h,m = log sum_n exp(s_h,m,n)                                                     (B, H, M)
    sums_g,n = sum of exp(s_h,m,n - lse_h,m) over counted m and the heads h that read g  (B, G, N)
    a_n = sum_g sums_g,n / (H * counted)                                                 (B, N)

A key is open if the mask allows it. Scores are computed twice, in tiles, and never stored: 4 B H M
N d operations. No atomics are used and the tiles of an image do not depend on the batch, so results
are bitwise reproducible. Sums are fp32 (fp64 for fp64 inputs). There is no gradient: the result
selects tokens.
Source: VisionZip (arXiv 2412.04467), for towers without a CLS token.
"""

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton, wrap_triton
from elip_kernels._validate import check_mask, check_scale, check_tensor, message
from elip_kernels.ops.cls_attention import check_keys
from elip_kernels.ops.gather_ops import accumulator

QUERIES = 128  # per step of the PyTorch implementation


def attention_column_mean(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Return how much attention each key receives, as a mean over heads and queries.

    Every query attends to every unmasked key. With one query the result is that of
    `cls_attention`. If queries and keys are the same tokens and some are padding, pass the mask
    twice: padding then receives nothing and does not count as a query::

        received = elip_kernels.attention_column_mean(q, k, mask=real, query_mask=real)

    Source: VisionZip (arXiv 2412.04467).

    Args:
        q: (B, H, M, d), fp32, bf16, fp16 or fp64.
        k: (B, G, N, d), same dtype and device. H is a multiple of G: query head h reads key head
            h // (H / G), as in `scaled_dot_product_attention(enable_gqa=True)`.
        scale: factor of the scores; d ** -0.5 by default.
        mask: (B, N) bool, True = may be attended to. If none is True, the image's row is NaN.
        query_mask: (B, M) bool, True = counts. If none is True, the image's row is NaN.

    Returns:
        (B, N) fp32 (fp64 for fp64 inputs), without gradient. Each row sums to 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    check_tensor("q", q, "(B, H, M, d)", 4)
    B, H, M, d = q.shape
    if H == 0 or M == 0 or d == 0:
        raise ValueError(message("q", "(B, H, M, d) with H, M and d at least 1", q))
    check_keys(k, q)
    check_mask(mask, (B, k.shape[2]), "q", q)
    check_mask(query_mask, (B, M), "q", q, argument="query_mask", names="(B, M)")
    return _column_mean_op(q.detach(), k.detach(), mask, query_mask, check_scale(scale, d))


def column_mean_reference(
    q: Tensor, k: Tensor, mask: Tensor | None, query_mask: Tensor | None, scale: float
) -> Tensor:
    """Compute `attention_column_mean` in PyTorch; no tensor exceeds (B, H, QUERIES, N)."""
    (B, H, M, _), (_, G, N, _), dtype = q.shape, k.shape, accumulator(q)
    keys, received = k.to(dtype).mT, k.new_zeros(B, N, dtype=dtype)
    counted = q.new_ones(B, M, dtype=torch.bool) if query_mask is None else query_mask
    for rows, counts in zip(q.split(QUERIES, 2), counted.split(QUERIES, 1), strict=True):
        rows = rows.to(dtype).unflatten(1, (G, -1)).flatten(2, 3)  # (B, G, H/G * m, d)
        scores = torch.matmul(rows, keys) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        shares = scores.softmax(-1).view(B, H, counts.shape[1], N)
        received += shares.masked_fill(~counts[:, None, :, None], 0.0).sum((1, 2))
    return received / (H * counted.sum(1, keepdim=True))


@triton.jit
def _rows(ptr, stride, offs, mask, D, BLOCK_D: tl.constexpr):
    """Load rows `offs` of one head [.., BLOCK_D]; zero where masked and beyond D."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + offs[:, None] * stride + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _products(rows, others, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Return the products of two tiles of rows, in fp32."""
    if WIDEN:  # in the interpreter, tl.dot of bf16 is wrong
        rows = rows.to(tl.float32)
        others = others.to(tl.float32)
    return tl.dot(rows, tl.trans(others), input_precision=PRECISION)


@triton.jit
def _is_open(mask_ptr, pid_b, offs, length, HAS_MASK: tl.constexpr):
    """Return which `offs` are tokens of the image that the mask allows."""
    is_open = offs < length
    if HAS_MASK:
        mask = tl.load(mask_ptr + pid_b * length + offs, mask=is_open, other=0)
        is_open = is_open & (mask != 0)
    return is_open


@triton.jit(do_not_specialize=["M", "N"])
def _lse_kernel(
    q_ptr, k_ptr, mask_ptr, query_mask_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, scale, M, N, D,
    HAS_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the log-sum-exp of each query's scores. Grid: (image, head, BLOCK_M queries).

    It is -inf for a query without an unmasked key, and inf for queries that do not count.
    """
    scale = tl.cast(scale, tl.float32)
    pid_b = tl.program_id(0).to(tl.int64)
    pid_h = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += pid_b * stride_qb + pid_h * stride_qh
    k_ptr += pid_b * stride_kb + pid_h // GROUP * stride_kh
    q = _rows(q_ptr, stride_qm, offs_m, offs_m < M, D, BLOCK_D)
    counts = _is_open(query_mask_ptr, pid_b, offs_m, M, HAS_QUERY_MASK)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, stride_kn, offs_n, offs_n < N, D, BLOCK_D)
        is_open = _is_open(mask_ptr, pid_b, offs_n, N, HAS_MASK)
        score = _products(q, k, PRECISION, WIDEN) * scale  # [BLOCK_M, BLOCK_N]
        score = tl.where(is_open[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - pivot) + tl.sum(tl.exp(score - pivot[:, None]), 1)
        top = higher
    row = (pid_b * tl.num_programs(1) + pid_h) * tl.num_programs(2) * BLOCK_M + offs_m
    tl.store(lse_ptr + row, tl.where(counts, top + tl.log(total), float("inf")))


@triton.jit(do_not_specialize=["M", "N"])
def _sums_kernel(
    q_ptr, k_ptr, mask_ptr, lse_ptr, sums_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, scale, M, N, D,
    HAS_MASK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store what each key receives from its queries. Grid: (image, key head, BLOCK_N keys)."""
    scale = tl.cast(scale, tl.float32)
    pid_b = tl.program_id(0).to(tl.int64)
    pid_g = tl.program_id(1).to(tl.int64)
    head = pid_b * tl.num_programs(1) + pid_g
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += pid_b * stride_qb + pid_g * GROUP * stride_qh
    k_ptr += pid_b * stride_kb + pid_g * stride_kh
    lse_ptr += head * GROUP * tl.cdiv(M, BLOCK_M) * BLOCK_M
    is_open = _is_open(mask_ptr, pid_b, offs_n, N, HAS_MASK)
    k = _rows(k_ptr, stride_kn, offs_n, is_open, D, BLOCK_D)
    bias = tl.where(is_open, 0.0, float("-inf"))
    received = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(0, GROUP):
        for start_m in range(0, M, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = _rows(q_ptr, stride_qm, offs_m, offs_m < M, D, BLOCK_D)
            lse = tl.load(lse_ptr + offs_m)
            score = _products(k, q, PRECISION, WIDEN) * scale  # [BLOCK_N, BLOCK_M]
            share = tl.exp(score + bias[:, None] - lse[None, :])
            received += tl.sum(tl.where(lse[None, :] == float("inf"), 0.0, share), 1)
        q_ptr += stride_qh
        lse_ptr += tl.cdiv(M, BLOCK_M) * BLOCK_M
    tl.store(sums_ptr + head * N + offs_n, received, mask=offs_n < N)


@triton.jit(do_not_specialize=["M", "N"])
def _mean_kernel(
    sums_ptr, query_mask_ptr, out_ptr, M, N, H, G, HAS_QUERY_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the mean over heads and counted queries. Grid: (image, BLOCK_N keys)."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    counted = M
    if HAS_QUERY_MASK:
        counts = tl.zeros([BLOCK_M], tl.int32)
        for start_m in range(0, M, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            counts += _is_open(query_mask_ptr, pid_b, offs_m, M, True).to(tl.int32)
        counted = tl.sum(counts, 0)
    received = tl.zeros([BLOCK_N], tl.float32)
    for start_g in range(0, G, BLOCK_G):
        offs_g = start_g + tl.arange(0, BLOCK_G)
        sums = tl.load(
            sums_ptr + (pid_b * G + offs_g)[:, None] * N + offs_n[None, :],
            mask=(offs_g < G)[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )  # [BLOCK_G, BLOCK_N]
        received += tl.sum(sums, 0)
    tl.store(out_ptr + pid_b * N + offs_n, received / (H * counted), mask=offs_n < N)


def _attention_column_mean(
    q: Tensor, k: Tensor, mask: Tensor | None, query_mask: Tensor | None, scale: float
) -> Tensor:
    """Allocate and launch: log-sum-exp per query, sums per key, mean."""
    (B, H, M, d), (_, G, N, _) = q.shape, k.shape
    q, k = launch.addressable(q), launch.addressable(k)
    mask, query_mask = launch.contiguous(mask, query_mask)
    out = k.new_empty(B, N, dtype=torch.float32)
    if N == 0:
        return out
    of_scores = (*q.stride()[:3], *k.stride()[:3], scale, M, N, d)
    settings = launch.column_sums(d, q.dtype)
    settings |= {"GROUP": H // G, "HAS_MASK": mask is not None}
    counted = {"HAS_QUERY_MASK": query_mask is not None}
    block_m, block_n = settings["BLOCK_M"], settings["BLOCK_N"]
    T = launch.cdiv(M, block_m)
    lse, sums = out.new_empty(B, H, T * block_m), out.new_empty(B, G, N)
    launch.run(
        wrap_triton(_lse_kernel),
        (B, H, T),
        *(q, k, mask, query_mask, lse, *of_scores),
        **settings,
        **counted,
    )
    launch.run(
        wrap_triton(_sums_kernel),
        (B, G, launch.cdiv(N, block_n)),
        *(q, k, mask, lse, sums, *of_scores),
        **settings,
    )
    settings = launch.column_mean(M, N)
    launch.run(
        wrap_triton(_mean_kernel),
        (B, launch.cdiv(N, settings["BLOCK_N"])),
        *(sums, query_mask, out, M, N, H, G),
        **settings,
        **counted,
    )
    return out


def _flops(q_shape, k_shape, *args, **kwargs) -> int:
    """Return 4 B H M N d: each score is computed twice."""
    (B, H, M, d), N = q_shape, k_shape[2]
    return 4 * B * H * M * N * d


_column_mean_op = Operator(
    "attention_column_mean",
    column_mean_reference,
    launcher=_attention_column_mean,
    unsupported=lambda q, k, *_: (
        launch.unsupported(q, k, candidates=max(q.shape[2], k.shape[2]))
        or launch.unsupported_head(q)
    ),
    fake=lambda q, k, *_: k.new_empty(k.shape[0], k.shape[2], dtype=accumulator(k)),
    flops=_flops,
)


@example_of(attention_column_mean)
def _example(sizes: Sizes) -> Arguments:
    q, k = (sizes.images(sizes.H, sizes.N, sizes.D // sizes.H) for _ in "qk")
    return {"q": q, "k": k}
