"""Gather, order and sum rows of a batch in PyTorch: helpers of the reference implementations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels._operator import exports_onnx, is_captured
from elip_kernels.differentiation import is_differentiated


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums over these tensors: fp32, or fp64 if one of them is fp64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def order_key(scores: Tensor, real: Tensor | None) -> Tensor:
    """Return integers (B, N-p) in the order of selection: numbers, then NaN, then padding.

    A captured graph has no bit casts, which ONNX and TorchScript lack. There the scores themselves
    are returned, clamped to half of the lowest number, with NaN as the lowest and padding as -inf.
    """
    if is_captured():
        lowest = torch.finfo(scores.dtype).min
        key = scores.clamp(min=lowest / 2).masked_fill(scores.isnan(), lowest)
        return key if real is None else key.masked_fill(~real, float("-inf"))
    bits = torch.int32 if scores.dtype == torch.float32 else torch.int64
    least, most = torch.iinfo(bits).min, torch.iinfo(bits).max
    key = (scores + 0.0).view(bits)  # -0.0 becomes +0.0
    key = torch.where(key < 0, key ^ most, key)  # orders as the scores do
    key = key.masked_fill(scores.isnan(), least + 1)
    return key if real is None else key.masked_fill(~real, least)


def places(scores: Tensor, real: Tensor | None, keep: int) -> Tensor:
    """Return (B, N-p): rows of kept candidates in image order, padding last; then the others."""
    key = order_key(scores, real)
    is_sorted = torch.compiler.is_exporting()  # TensorRT has no other TopK
    last = key.topk(keep, dim=1, sorted=is_sorted).values.amin(1, keepdim=True)
    above, equal = key > last, key == last
    is_kept = above | (equal & (equal.cumsum(1) <= keep - above.sum(1, keepdim=True)))
    count = is_kept.cumsum(1)
    others = torch.arange(keep, keep + scores.shape[1], device=scores.device) - count
    if real is not None:
        fills = is_kept & ~real
        filled = fills.cumsum(1)
        count = torch.where(fills, keep - filled[:, -1:] + filled, count - filled)
    return torch.where(is_kept, count - 1, others)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return positions (B, count) of the largest scores (B, N), descending; ties: lower first."""
    if exports_onnx():  # no stable sort, but TopK breaks ties the same way
        return scores.topk(count, dim=1).indices
    if torch.compiler.is_exporting():  # a program, from which an ONNX graph can be made
        return largest_by_rank(scores, count)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def largest_by_rank(scores: Tensor, count: int) -> Tensor:
    """Return the positions of `largest` without a stable sort: of integers that are all different.

    Equal scores have the same rank, and then their position decides.
    """
    N = scores.shape[1]
    values, order = scores.topk(N, dim=1)
    rank = F.pad(values[:, 1:] != values[:, :-1], (1, 0)).cumsum(1)
    key = torch.zeros_like(order).scatter(1, order, rank * N)
    return (key + torch.arange(N, device=scores.device)).topk(count, dim=1, largest=False).indices


def without_nan(x: Tensor) -> Tensor:
    """Return x, which has no infinities, with -inf in place of NaN; x itself may be overwritten."""
    if torch.compiler.is_exporting():  # two nodes of ONNX, nan_to_num has nine
        return x.masked_fill(x.isnan(), float("-inf"))
    return x.nan_to_num_(float("-inf"))


def rows_of_batch(rows: Tensor, N: int) -> Tensor:
    """Return row indices (B, ...) of N rows per image as indices into the B * N rows of all."""
    if rows.shape[0] == 1 and not torch.jit.is_tracing():  # a trace would be of one image for ever
        return rows
    first = N * torch.arange(rows.shape[0], device=rows.device)
    return rows + first.view(-1, *[1] * (rows.dim() - 1))


def flat_rows(rows: Tensor, N: int) -> Tensor:
    """Return row indices (B, ...) of N rows per image as indices into B * N rows, flattened."""
    return rows_of_batch(rows, N).reshape(-1)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows (B, R) of x (B, N, D) as (B, R, D), in one pass."""
    B, N, D = x.shape
    if torch.compiler.is_exporting():  # ONNX gathers by indices of any shape
        return F.embedding(rows_of_batch(rows, N), x.reshape(B * N, D))
    return x.reshape(B * N, D).index_select(0, flat_rows(rows, N)).view(*rows.shape, D)


def sum_rows(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return (B, G, D): weighted sums over rows (B, G, M) of x, in the dtype of `weight`."""
    (B, N, D), (_, G, M) = x.shape, rows.shape
    if torch.compiler.is_exporting() or is_differentiated(x, weight):  # embedding_bag is slow
        sources = take_rows(x.to(weight.dtype), rows.reshape(B, G * M)).view(B, G, M, D)
        return (weight[:, :, None] @ sources)[:, :, 0].to(x.dtype)
    sums = F.embedding_bag(
        flat_rows(rows, N).view(B * G, M),
        x.reshape(B * N, D).to(weight.dtype),
        per_sample_weights=weight.reshape(B * G, M),
        mode="sum",
    )
    return sums.view(B, G, D).to(x.dtype)


def sums_by(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Return (count, D): values (M, D) summed by row (M,).

    CUDA sorts, for a fixed order. An exported graph scatters elements: onnxruntime adds rows
    (`ScatterND`) in several threads without a lock, and loses some.
    """
    sums = values.new_zeros(count, values.shape[1])
    if torch.compiler.is_exporting():
        return sums.scatter_add_(0, rows.long()[:, None].expand_as(values), values)
    if values.is_cuda:
        return sums.index_put_((rows.long(),), values, accumulate=True)
    return sums.index_add_(0, rows, values)


def add_rows(x: Tensor, rows: Tensor, weight: Tensor, R: int) -> Tensor:
    """Return (B, R, D): x (B, N, D) times weight (B, N), summed by row index (B, N)."""
    B, _, D = x.shape
    weighted = (x * weight[..., None]).reshape(-1, D)
    return sums_by(flat_rows(rows, R), weighted, B * R).view(B, R, D).to(x.dtype)


def merge_rows(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return (B, D): the weighted sum of rows (B, M) of x; rows of weight 0 are not read."""
    top = weight.abs().max(1, keepdim=True)
    rows = rows.where(weight != 0, rows.gather(1, top.indices))
    merged = sum_rows(x, rows[:, None], weight[:, None])[:, 0]
    return merged.masked_fill_(top.values == 0, 0.0)
