"""Checks of the arguments of `bipartite_merge`, `apply_merge` and `merge_nearest`."""

import torch
from torch import Tensor

from elip_kernels._validate import (
    check_dense,
    check_device,
    check_metric,
    check_range,
    check_shape,
    check_tensor,
    check_tokens,
    is_readable,
    message,
)
from elip_kernels.ops.gather_ops import accumulator


def check_arguments(tokens: Tensor, metric: Tensor, r: int, num_prefix_tokens: int) -> None:
    """Check tokens, metric, r and num_prefix_tokens of `bipartite_merge`."""
    check_tokens(tokens)
    check_metric(metric, tokens)
    if isinstance(r, bool) or not isinstance(r, (int, torch.SymInt)):
        raise TypeError(message("r", "an int, the number of tokens to merge away", r))
    if r < 0:
        raise ValueError(message("r", "r >= 0", r))
    expected = f"an int in [0, N={tokens.shape[1]}]"
    if isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, int):
        raise TypeError(message("num_prefix_tokens", expected, num_prefix_tokens))
    if not 0 <= num_prefix_tokens <= tokens.shape[1]:
        raise ValueError(message("num_prefix_tokens", expected, num_prefix_tokens))


def check_lengths(lengths: Tensor | None, merges: Tensor | None, r: int, tokens: Tensor) -> None:
    """Check lengths, merges, and r beside them."""
    B, N, _ = tokens.shape
    for name, counts in (("lengths", lengths), ("merges", merges)):
        if counts is None:
            continue
        check_dense(name, counts, "a tensor", "(B,) int64")
        if counts.dtype != torch.int64:
            raise TypeError(message(name, "(B,) int64", counts))
        check_shape(name, counts, (B,), "(B,)")
        check_device(name, counts, "tokens", tokens)
        check_range(name, counts, 0, N)
    if lengths is None and merges is not None:
        remedy = "pass the number of real tokens too"
        raise ValueError(message("merges", "None without lengths", merges, remedy))
    if merges is not None and r >= N:
        raise ValueError(message("r", f"fewer than N = {N}, to leave a row", r))


def counts_within(
    lengths: Tensor, merges: Tensor | None, r: int, N: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return lengths and merges (B,) within their limits; check that N-r rows are enough."""
    lengths = lengths.clamp(min=num_prefix_tokens)
    half = (lengths - num_prefix_tokens) // 2
    merges = half.clamp(max=r) if merges is None else torch.minimum(merges, half)
    left = lengths - merges
    if is_readable(left) and (left > N - r).any():
        expected = f"at most {N - int(left.max())}, so that {int(left.max())} rows are left"
        raise ValueError(message("r", expected, r))
    return lengths, merges


def check_size(size: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return sizes (B, N) in the accumulator's dtype, without gradient, or None."""
    if size is None:
        return None
    B, N, _ = tokens.shape
    check_tensor("size", size, "(B, N) or (B, N, 1)", (2, 3))
    _check_fp32_or_fp64("size", size)
    shape = (B, N, 1)[: size.dim()]
    check_shape("size", size, shape, "(B, N) or (B, N, 1)")
    check_device("size", size, "tokens", tokens)
    return size.detach().reshape(B, N).to(accumulator(tokens))


def check_size_values(size: Tensor | None) -> None:
    """Check that sizes (B, N) are not negative and that no sum of them overflows, on the CPU."""
    if size is not None and is_readable(size):
        check_range("size", size, 0, torch.finfo(size.dtype).max / size.shape[1])


def check_penalty(penalty: Tensor | None, metric: Tensor) -> Tensor | None:
    """Return penalties (B, N) in the accumulator's dtype, without gradient, or None."""
    if penalty is None:
        return None
    check_tensor("penalty", penalty, "(B, N)", 2)
    _check_fp32_or_fp64("penalty", penalty)
    check_shape("penalty", penalty, tuple(metric.shape[:2]), "(B, N)")
    check_device("penalty", penalty, "tokens", metric)
    return penalty.detach().to(accumulator(metric))


def _check_fp32_or_fp64(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(message(name, "fp32 or fp64", tensor, f"cast it: {name}.float()"))
