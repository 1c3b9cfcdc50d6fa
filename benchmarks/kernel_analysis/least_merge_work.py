"""Minimum work of the merging ops, counted as in `least_work.py`."""

from math import ceil

import torch

from benchmarks.kernel_analysis.work import FP32, INT32, INT64, Work, together
from elip_kernels import launch


def bipartite_merge(
    B: int,
    N: int,
    D: int,
    C: int,
    r: int,
    dtype: torch.dtype,
    *,
    has_size: bool = False,
    has_penalty: bool = False,
) -> Work:
    """Return the work of four launches: `bipartite_match`, `bipartite_slots`, `apply_merge`."""
    return together(
        bipartite_match(B, N, C, dtype, has_penalty=has_penalty),
        bipartite_slots(B, N),
        apply_merge(B, N, D, N - r, dtype, has_size=has_size),
    )


def bipartite_match(
    B: int, N: int, C: int, dtype: torch.dtype, *, has_penalty: bool = False, tiled: bool = False
) -> Work:
    """Count scores, penalties and partners of A. `tiled`: each tile of A reads all of B."""
    size, num_a, num_b = dtype.itemsize, (N + 1) // 2, N // 2
    tiles = ceil(num_a / launch.bipartite_match(C, size)[0]) if tiled else 1
    read = {"metric": B * (num_a + tiles * num_b) * C * size}
    if has_penalty:
        read["penalty"] = B * num_a * FP32
    written = {"best": B * num_a * FP32, "partner": B * num_a * INT32}
    return Work(read, written, 2 * B * num_a * num_b * C)


def bipartite_slots(B: int, N: int) -> Work:
    """Count the output row of every token."""
    num_a = (N + 1) // 2
    read = {"best": B * num_a * FP32, "partner": B * num_a * INT32}
    return Work(read, {"slots": B * N * INT32}, 0)


def apply_merge(
    B: int, N: int, D: int, R: int, dtype: torch.dtype, *, has_size: bool = False
) -> Work:
    """Return the work of `merge_order` and `merge_gather`, which turn N tokens into R rows."""
    order = merge_order(B, N, R, has_size=has_size)
    return together(order, merge_gather(B, N, D, R, dtype, has_size=has_size))


def merge_order(B: int, N: int, R: int, *, has_size: bool = False, tiled: bool = False) -> Work:
    """Count tokens by row, row starts and sizes. `tiled`: each tile reads all slots and sizes."""
    tiles = ceil(max(N, R) / launch.merge_order(N)[0]) if tiled else 1
    read = {"slots": B * tiles * N * INT32}
    if has_size:
        read["size"] = B * tiles * N * FP32
    written = {"order": B * N * INT32, "starts": B * R * INT32, "out_size": B * R * FP32}
    return Work(read, written, 0)


def merge_gather(
    B: int,
    N: int,
    D: int,
    R: int,
    dtype: torch.dtype,
    *,
    has_size: bool = False,
    tiled: bool = False,
) -> Work:
    """Count tokens moved to R rows. `tiled`: each slice of D reads the small tensors."""
    rows, block_d, _ = launch.merge_gather(dtype.itemsize)
    slices, behind = (ceil(D / block_d), ceil(R / rows) - 1) if tiled else (1, 0)
    read = {"tokens": B * N * D * dtype.itemsize, "order": B * slices * N * INT32}
    read |= {"starts": B * slices * (R + behind) * INT32, "out_size": B * slices * R * FP32}
    if has_size:
        read["size"] = B * slices * N * FP32
    return Work(read, {"out": B * R * D * dtype.itemsize}, 2 * B * N * D)


def bipartite_merge_backward(
    B: int,
    N: int,
    D: int,
    r: int,
    dtype: torch.dtype,
    *,
    has_size: bool = False,
    tiled: bool = False,
) -> Work:
    """Count gradients of rows copied to tokens. `tiled`: a row per token, and all per slice."""
    size, rows = dtype.itemsize, N if tiled else N - r
    slices = ceil(D / launch.reduce_backward(size).block_d) if tiled else 1
    read = {"grad_out": B * rows * D * size, "out_size": B * slices * rows * FP32}
    read["slots"] = B * slices * N * INT32
    if has_size:
        read["size"] = B * slices * N * FP32
    return Work(read, {"grad": B * N * D * size}, B * N * D)


def merge_nearest(
    B: int,
    N: int,
    D: int,
    C: int,
    K: int,
    dtype: torch.dtype,
    *,
    has_size: bool = False,
    p: int = 1,
) -> Work:
    """Return the work of `nearest_match` and `apply_merge`, without that of `select`."""
    merged = apply_merge(B, N, D, p + K, dtype, has_size=has_size)
    return together(nearest_match(B, N, C, K, dtype), merged)


def nearest_match(
    B: int, N: int, C: int, K: int, dtype: torch.dtype, *, tiled: bool = False
) -> Work:
    """Count the output row of every token. `tiled`: each tile of tokens reads all kept ones."""
    size = dtype.itemsize
    tiles = ceil(N / launch.bipartite_match(C, size)[0]) if tiled else 1
    read = {"metric": B * (N - K + tiles * K) * C * size, "kept": B * tiles * K * INT64}
    return Work(read, {"slots": B * N * INT32}, 2 * B * N * K * C)
