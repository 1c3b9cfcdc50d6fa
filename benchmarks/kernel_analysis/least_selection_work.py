"""Minimum work of `select_diverse` and `select_dpp`, counted as in `least_work.py`."""

from math import ceil

import torch

from benchmarks.kernel_analysis.work import FP32, INT64, Work, together
from elip_kernels import launch


def select_diverse(B: int, N: int, D: int, K: int, dtype: torch.dtype) -> Work:
    """Return the work of `cosines` and `diverse`."""
    return together(cosines(B, N, D, dtype, has_nearest=True), diverse(B, N, D, K, dtype))


def select_dpp(
    B: int, N: int, D: int, K: int, dtype: torch.dtype, *, has_relevance: bool = False
) -> Work:
    """Return the work of `cosines` and `dpp`."""
    return together(cosines(B, N, D, dtype), dpp(B, N, K, has_relevance=has_relevance))


def cosines(
    B: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    *,
    has_nearest: bool = False,
    tiled: bool = False,
) -> Work:
    """Count the cosines of all pairs. `tiled`: each tile reads its rows and its columns."""
    tiles = _tiles(N, D, dtype)
    read = {"tokens": B * N * D * dtype.itemsize * (2 * tiles - 1 if tiled else 1)}
    written = {"cosine": B * N * N * FP32}
    if has_nearest:
        written["nearest"] = B * tiles * N * FP32
    return Work(read, written, 2 * B * N * N * D)


def diverse(B: int, N: int, D: int, K: int, dtype: torch.dtype) -> Work:
    """Count the nearest cosines of tiles, the diagonal, and a row per token but the last."""
    read = {"cosine": _rows(B, N, K - 1), "nearest": B * _tiles(N, D, dtype) * N * FP32}
    return Work(read, {"order": B * K * INT64}, 0)


def dpp(B: int, N: int, K: int, *, has_relevance: bool = False) -> Work:
    """Count the diagonal, a row per token, and the columns of the factor."""
    read = {"cosine": _rows(B, N, K)}
    if K > 1:
        read["factor"] = B * (K - 1) * N * FP32
    if has_relevance:
        read["relevance"] = B * N * FP32
    written = {"order": B * K * INT64, "factor": B * K * N * FP32}
    return Work(read, written, B * N * K * (K - 1))


def _tiles(N: int, D: int, dtype: torch.dtype) -> int:
    return ceil(N / launch.bipartite_match(D, dtype.itemsize)[0])


def _rows(B: int, N: int, count: int) -> int:
    """Return the bytes of rows of cosines and of the rest of the diagonal."""
    return B * (count * N + N - count) * FP32
