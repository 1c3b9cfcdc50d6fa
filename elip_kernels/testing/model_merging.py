"""The least that merging must do, counted as `model.py` says: ToMe's pairs, and each token into the
nearest kept one."""

from math import ceil

import torch

from elip_kernels import launch
from elip_kernels.testing.work import FP32, INT32, INT64, Work, together


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
    """The three launches: `bipartite_match`, `bipartite_slots`, `bipartite_gather`."""
    return together(
        bipartite_match(B, N, C, dtype, has_penalty=has_penalty),
        bipartite_slots(B, N),
        bipartite_gather(B, N, D, r, dtype, has_size=has_size),
    )


def bipartite_match(
    B: int, N: int, C: int, dtype: torch.dtype, *, has_penalty: bool = False, tiled: bool = False
) -> Work:
    """Scores, less a penalty, and partners of A. `tiled`: each tile of A reads all of B."""
    size, num_a, num_b = dtype.itemsize, (N + 1) // 2, N // 2
    tiles = ceil(num_a / launch.bipartite_match(C, size)[0]) if tiled else 1
    read = {"metric": B * (num_a + tiles * num_b) * C * size}
    if has_penalty:
        read["penalty"] = B * num_a * FP32
    written = {"best": B * num_a * FP32, "partner": B * num_a * INT32}
    return Work(read, written, 2 * B * num_a * num_b * C)


def bipartite_slots(B: int, N: int) -> Work:
    """The output row of every token."""
    num_a = (N + 1) // 2
    read = {"best": B * num_a * FP32, "partner": B * num_a * INT32}
    return Work(read, {"slots": B * N * INT32}, 0)


def bipartite_gather(
    B: int,
    N: int,
    D: int,
    r: int,
    dtype: torch.dtype,
    *,
    has_size: bool = False,
    tiled: bool = False,
) -> Work:
    """Tokens to their rows; the rows of B follow from N and r, so only A's slots are read.

    `tiled`: every tile of every slice of D looks through A's slots and sizes.
    """
    size, num_a = dtype.itemsize, (N + 1) // 2
    _, block_r, block_d, _ = launch.merge(num_a, size)
    slices = ceil(D / block_d) if tiled else 1
    tiles = slices * ceil((N - r) / block_r) if tiled else 1
    read = {"tokens": B * N * D * size, "slots": B * tiles * num_a * INT32}
    if has_size:
        read["size"] = B * (tiles * num_a + slices * (N // 2)) * FP32
    written = {"out": B * (N - r) * D * size, "out_size": B * (N - r) * FP32}
    return Work(read, written, 2 * B * N * D)


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
    """Every token takes its row's gradient.

    `tiled`: at most a row for every token, since a row's sources may lie in as many tiles, and the
    small tensors with every slice of D.
    """
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
    """The launches `nearest_match` and `nearest_gather`, behind `select`; backward is
    `bipartite_merge_backward` with N - p - K tokens merged away."""
    gathered = nearest_gather(B, N, D, p + K, dtype, has_size=has_size)
    return together(nearest_match(B, N, C, K, dtype), gathered)


def nearest_match(
    B: int, N: int, C: int, K: int, dtype: torch.dtype, *, tiled: bool = False
) -> Work:
    """The output row of every token. `tiled`: each tile of tokens reads all kept ones."""
    size = dtype.itemsize
    tiles = ceil(N / launch.bipartite_match(C, size)[0]) if tiled else 1
    read = {"metric": B * (N - K + tiles * K) * C * size, "kept": B * tiles * K * INT64}
    return Work(read, {"slots": B * N * INT32}, 2 * B * N * K * C)


def nearest_gather(
    B: int,
    N: int,
    D: int,
    R: int,
    dtype: torch.dtype,
    *,
    has_size: bool = False,
    tiled: bool = False,
) -> Work:
    """Tokens to their R rows. `tiled`: every tile of every slice of D looks through all slots and
    sizes."""
    size = dtype.itemsize
    _, block_r, block_d, _ = launch.merge(N, size)
    tiles = ceil(D / block_d) * ceil(R / block_r) if tiled else 1
    read = {"tokens": B * N * D * size, "slots": B * tiles * N * INT32}
    if has_size:
        read["size"] = B * tiles * N * FP32
    written = {"out": B * R * D * size, "out_size": B * R * FP32}
    return Work(read, written, 2 * B * N * D)
