"""Rows of a batch by score and by index, in PyTorch: what the reference forms are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels._operator import exports_onnx, is_differentiated
from elip_kernels.autocast import without_autocast


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype that sums of them are taken in: fp32, or fp64 if one of them is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def order_key(scores: Tensor, real: Tensor | None) -> Tensor:
    """Integers (B, N-p) in the order of selection: numbers above NaN above padding.

    ONNX reads no bits: there the scores themselves, -inf being the least number, and NaN padding.
    """
    if exports_onnx():
        is_last = scores.isnan() if real is None else scores.isnan() | ~real
        key = scores.clamp(min=torch.finfo(scores.dtype).min)
        return key.masked_fill(is_last, float("-inf"))
    bits = torch.int32 if scores.dtype == torch.float32 else torch.int64
    least, most = torch.iinfo(bits).min, torch.iinfo(bits).max
    key = (scores + 0.0).view(bits)  # one zero
    key = torch.where(key < 0, key ^ most, key)  # ascends with the number
    key = key.masked_fill(scores.isnan(), least + 1)
    return key if real is None else key.masked_fill(~real, least)


def largest(scores: Tensor, count: int) -> Tensor:
    """Positions (B, count) of the largest scores (B, N), descending; ties: the lower position."""
    if exports_onnx():  # it has no stable sort, but a TopK that settles ties so
        return scores.topk(count, dim=1).indices
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


@without_autocast
def cosines(x: Tensor) -> Tensor:
    """X (B, N, C) -> (B, N, N) in at least fp32: the cosine of each pair."""
    unit = F.normalize(x.to(accumulator(x)), dim=2)
    return unit @ unit.mT


def flat_rows(rows: Tensor, N: int) -> Tensor:
    """Rows (B, ...) of N rows an image -> (B * ...,), rows of all images counted through."""
    first = torch.arange(0, rows.shape[0] * N, N, device=rows.device)
    return (rows + first.view(-1, *[1] * (rows.dim() - 1))).reshape(-1)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """X (B, N, D), rows (B, R) -> (B, R, D), one pass."""
    B, N, D = x.shape
    return x.reshape(B * N, D).index_select(0, flat_rows(rows, N)).view(*rows.shape, D)


def sum_rows(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """X (B, N, D), rows and weight (B, G, M) -> (B, G, D), summed in the dtype of `weight`."""
    (B, N, D), (_, G, M) = x.shape, rows.shape
    if exports_onnx() or is_differentiated():  # without bags, or with a loop over them
        taken = take_rows(x.to(weight.dtype), rows.reshape(B, G * M)).view(B, G, M, D)
        return (weight[:, :, None] @ taken)[:, :, 0].to(x.dtype)
    sums = F.embedding_bag(
        flat_rows(rows, N).view(B * G, M),
        x.reshape(B * N, D).to(weight.dtype),
        per_sample_weights=weight.reshape(B * G, M),
        mode="sum",
    )
    return sums.view(B, G, D).to(x.dtype)


def sums_by(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Values (M, ...), added up by rows (M,) -> (count, ...), in the same order every time: on CUDA
    by sorting, where `index_add` adds as its threads come.
    """
    sums = values.new_zeros(count, *values.shape[1:])
    if values.is_cuda:
        return sums.index_put_((rows.long(),), values, accumulate=True)
    return sums.index_add_(0, rows, values)


def add_rows(x: Tensor, rows: Tensor, weight: Tensor, R: int) -> Tensor:
    """X (B, N, D) times weight (B, N), added up by rows (B, N) -> (B, R, D)."""
    B, _, D = x.shape
    weighted = (x * weight[..., None]).reshape(-1, D)
    return sums_by(flat_rows(rows, R), weighted, B * R).view(B, R, D).to(x.dtype)


def merge_rows(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """X (B, N, D), rows and weight (B, M) -> (B, D); rows of weight zero are not read."""
    top = weight.abs().max(1, keepdim=True)
    rows = rows.where(weight != 0, rows.gather(1, top.indices))
    merged = sum_rows(x, rows[:, None], weight[:, None])[:, 0]
    return merged.masked_fill_(top.values == 0, 0.0)
