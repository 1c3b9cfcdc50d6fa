"""Minimum work of each launch: bytes read and written by tensor, and operations.

The count contains the bytes that a launch reads and writes, each once, under the names of the
kernel's pointers: inputs, outputs, and what a launch stores for the next launch or the backward.
Rows that no output depends on are not counted: the CLS row that `cls` replaces, and dropped tokens
without merging. Parameter vectors of a block are not counted; they are a thousandth of its
matrices. Rows, weights, sizes and the query are fp32, slots int32, kept positions int64.

The work of an op with several launches is their sum. `score_reduce` reads the tokens twice, to
score and to move, because the tokens of an image do not fit one program. Operations follow the op's
FLOP formula; a multiply and an add are two.
"""

from collections import Counter
from math import ceil
from typing import NamedTuple

import torch

from elip_kernels import launch

FP32 = INT32 = 4
INT64 = 8
Bytes = dict[str, int]


class Work(NamedTuple):
    """Bytes read and written by tensor, and operations."""

    read: Bytes
    written: Bytes
    operations: int = 0

    @property
    def bytes(self) -> int:
        """Return all bytes read and written."""
        return sum(self.read.values()) + sum(self.written.values())


def together(*launches: Work) -> Work:
    """Return the work of several launches in sequence."""
    read, written = Counter(), Counter()
    for work in launches:
        read.update(work.read)
        written.update(work.written)
    return Work(dict(read), dict(written), sum(work.operations for work in launches))


# reduce


def reduce(
    B: int,
    N: int,
    D: int,
    K: int,
    dtype: torch.dtype,
    *,
    num_prefix_tokens: int = 1,
    merge: bool = True,
) -> Work:
    """Count selection and movement; without merging, only kept tokens are read."""
    p, row = num_prefix_tokens, D * dtype.itemsize
    read = {"tokens": B * (N if merge else p + K) * row, "scores": B * (N - p) * FP32}
    written = {"out": B * (p + K + merge) * row, **_selection(B, N, K)}
    return Work(read, written, 2 * B * (N - p - K) * D if merge else 0)


def reduce_backward(
    B: int,
    N: int,
    D: int,
    K: int,
    dtype: torch.dtype,
    *,
    num_prefix_tokens: int = 1,
    merge: bool = True,
) -> Work:
    """Count the gradients; weights are read only if there is a merged row."""
    p, row = num_prefix_tokens, D * dtype.itemsize
    read = {"grad_out": B * (p + K + merge) * row, "slots": B * N * INT32}
    read |= {"weights": B * N * FP32} if merge else {}
    return Work(read, {"grad": B * N * row}, B * (N - p - K) * D if merge else 0)


def move(B: int, N: int, D: int, K: int, dtype: torch.dtype, *, merge: bool = True) -> Work:
    """Count tokens moved to their rows by known slots."""
    row = B * D * dtype.itemsize
    read = {"tokens": (N if merge else K + 1) * row, "slots": B * N * INT32}
    read |= {"weights": B * N * FP32} if merge else {}
    return Work(read, {"out": (K + 1 + merge) * row}, 2 * B * (N - 1 - K) * D if merge else 0)


def select(B: int, N: int, K: int) -> Work:
    """Count scores read and positions written."""
    return Work({"scores": B * (N - 1) * FP32}, {"kept": B * K * INT64})


def _selection(B: int, N: int, K: int) -> Bytes:
    """Return the bytes that a selection writes."""
    return {"kept": B * K * INT64, "weights": B * N * FP32, "slots": B * N * INT32}


# Rows of attention from q and k


def cls_attention(B: int, H: int, N: int, d: int, dtype: torch.dtype) -> Work:
    """Return the work of `key_scores` and `row_of_keys`."""
    return together(key_scores(B, H, N, d, dtype), row_of_keys(B, H, N))


def key_scores(B: int, H: int, N: int, d: int, dtype: torch.dtype, *, group: int = 1) -> Work:
    """Count q, k, and scores of tiles, with `group` q heads per k head."""
    head = B * H * d * dtype.itemsize
    written = _scores(B, N, H, _key_tiles(N)) | {"cls_score": B * H * FP32}
    return Work({"q": head, "k": head * N // group}, written, 2 * B * H * N * d)


def row_of_keys(B: int, H: int, N: int) -> Work:
    """Count the row, which is computed from the scores of the tiles as in `row`."""
    return _row(B, N, H, _key_tiles(N))


def _key_tiles(N: int) -> int:
    return max(1, ceil((N - 1) / launch.KEYS))


def attention_column_mean(
    B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype
) -> Work:
    """Return the work of `query_sums`, `key_sums` and `column_mean`, with G heads of keys."""
    shape = (B, H, G, M, N, d, dtype)
    return together(query_sums(*shape), key_sums(*shape), column_mean(B, G, N))


def query_sums(B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype) -> Work:
    """Count the log-sum-exp of queries, in whole tiles."""
    row, block = d * dtype.itemsize, launch.column_sums(d, dtype)["BLOCK_M"]
    written = {"lse": B * H * ceil(M / block) * block * FP32}
    return Work({"q": B * H * M * row, "k": B * G * N * row}, written, 2 * B * H * M * N * d)


def key_sums(B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype) -> Work:
    """Count what each key receives from its heads."""
    queries = query_sums(B, H, G, M, N, d, dtype)
    return Work(queries.read | queries.written, {"sums": B * G * N * FP32}, queries.operations)


def column_mean(B: int, G: int, N: int) -> Work:
    """Count the mean over the heads of keys."""
    return Work({"sums": B * G * N * FP32}, {"out": B * N * FP32})


# Rows of attention from tokens, and the stage boundary


def cls_attention_from_tokens(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """Return the work of `query`, `score_tiles` and `row`."""
    tiles = score_tiles(B, N, D, H, dtype)
    return together(query(B, D, H, dtype), tiles, row(B, N, D, H, dtype))


def cls_attention_output(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """Return the work of `query`, `weights`, `weigh` and `value`."""
    made = query(B, D, H, dtype, normed=True), weights(B, N, D, H, dtype), weigh(B, N, D, H, dtype)
    return together(*made, value(B, N, D, H, dtype))


def score_reduce(
    B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype, *, merge: bool = True
) -> Work:
    """Return the work of `query`, `score_tiles`, `select_row` and `move`."""
    first = together(query(B, D, H, dtype), score_tiles(B, N, D, H, dtype))
    second = together(select_row(B, N, D, K, H, dtype), move(B, N, D, K, dtype, merge=merge))
    return together(first, second)


def query(
    B: int,
    D: int,
    H: int,
    dtype: torch.dtype,
    *,
    width: int | None = None,
    has_text: bool = False,
    normed: bool = False,
) -> Work:
    """Count CLS tokens, texts and two matrices (`width`, D) read; u and CLS scores written."""
    size, width = dtype.itemsize, width or D
    read = {"cls": B * D * size, "q_weight": width * D * size, "k_weight": width * D * size}
    read |= {"text": B * D * size} if has_text else {}
    written = {"query": B * H * D * FP32, "cls_score": B * H * FP32}
    written |= {"normed": B * D * FP32} if normed else {}
    return Work(read, written, 4 * B * D * width + 2 * B * H * D)


def score_tiles(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """Count scores of patches, and each tile's maximum and sum."""
    written = _scores(B, N, H, _tiles(B, N, D, H, dtype))
    return Work(_patches(B, N, D, H, dtype), written, 2 * B * H * (N - 1) * D)


def row(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """Count the row from the scores of tiles."""
    return _row(B, N, H, _tiles(B, N, D, H, dtype))


def select_row(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Work:
    """Count the row and its selection."""
    made = row(B, N, D, H, dtype)
    return made._replace(written={"row": made.written["out"], **_selection(B, N, K)})


def weights(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """Count patches and u read, weights of tiles written."""
    return Work(_patches(B, N, D, H, dtype), _weights(B, N, D, H, dtype), 2 * B * H * (N - 1) * D)


def weigh(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """Count patches, weights and normalised CLS read; a sum of tokens per head and part written."""
    read = _weights(B, N, D, H, dtype) | {"tokens": B * (N - 1) * D * dtype.itemsize}
    read |= {"cls": B * D * FP32, "cls_score": B * H * FP32}
    return Work(read, {"out": _parts(N) * B * H * D * FP32}, 2 * B * H * N * D)


def value(B: int, N: int, D: int, H: int, dtype: torch.dtype, *, width: int | None = None) -> Work:
    """Count sums of tokens, W_v (`width`, D) and the output."""
    width = width or D
    read = {"means": _parts(N) * B * H * D * FP32, "v_weight": width * D * dtype.itemsize}
    return Work(read, {"out": B * width * dtype.itemsize}, 2 * B * D * width)


def _patches(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Bytes:
    """Return the bytes that scoring reads."""
    return {"tokens": B * (N - 1) * D * dtype.itemsize, "query": B * H * D * FP32}


def _scores(B: int, N: int, H: int, tiles: int) -> Bytes:
    """Return the bytes that the tiles store."""
    totals = B * H * tiles * FP32
    return {"scores": B * H * (N - 1) * FP32, "tops": totals, "totals": totals}


def _row(B: int, N: int, H: int, tiles: int) -> Work:
    """Count a row that is computed from the scores of tiles."""
    return Work(_scores(B, N, H, tiles) | {"cls_score": B * H * FP32}, {"out": B * N * FP32})


def _weights(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Bytes:
    """Return the bytes of the weights of tiles, with a rest of each for two-byte tokens."""
    block_n = launch.weight_tiles(H, _tokens(B, N, D, dtype))["BLOCK_N"]
    heads = B * H * ceil((N - 1) / block_n)
    stored = {"weights": heads * block_n * dtype.itemsize, "tops": heads * FP32}
    stored["totals"] = heads * FP32
    if dtype == torch.float32:
        return stored | {"means": B * (N - 1) * FP32}
    return stored | {"rests": stored["weights"], "shifts": heads * FP32}


def _tokens(B: int, N: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """Return tokens on the meta device, to read the configuration in launch.py."""
    return torch.empty(B, N, D, dtype=dtype, device="meta")


def _tiles(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> int:
    """Return the number of tiles of patches per image."""
    return ceil((N - 1) / launch.score_tiles(H, _tokens(B, N, D, dtype))["BLOCK_N"])


def _parts(N: int) -> int:
    """Return the number of parts in which an output of many tokens is computed."""
    return max(1, ceil((N - 1) / launch.PART))


# Merging


def bipartite_merge(
    B: int, N: int, D: int, C: int, r: int, dtype: torch.dtype, *, has_size: bool = False
) -> Work:
    """Return the work of four launches: `bipartite_match`, `bipartite_slots`, `apply_merge`."""
    merged = apply_merge(B, N, D, N - r, dtype, has_size=has_size)
    return together(bipartite_match(B, N, C, dtype), bipartite_slots(B, N), merged)


def merge_nearest(
    B: int, N: int, D: int, C: int, K: int, dtype: torch.dtype, *, has_size: bool = False
) -> Work:
    """Return the work of `nearest_match` and `apply_merge`, without that of `select`."""
    merged = apply_merge(B, N, D, 1 + K, dtype, has_size=has_size)
    return together(nearest_match(B, N, C, K, dtype), merged)


def apply_merge(
    B: int, N: int, D: int, R: int, dtype: torch.dtype, *, has_size: bool = False
) -> Work:
    """Return the work of `merge_order` and `merge_gather`, which turn N tokens into R rows."""
    order = merge_order(B, N, R, has_size=has_size)
    return together(order, merge_gather(B, N, D, R, dtype, has_size=has_size))


def bipartite_match(
    B: int, N: int, C: int, dtype: torch.dtype, *, has_penalty: bool = False
) -> Work:
    """Count scores, penalties and partners of A."""
    num_a, num_b = (N + 1) // 2, N // 2
    read = {"metric": B * N * C * dtype.itemsize}
    read |= {"penalty": B * num_a * FP32} if has_penalty else {}
    written = {"best": B * num_a * FP32, "partner": B * num_a * INT32}
    return Work(read, written, 2 * B * num_a * num_b * C)


def bipartite_slots(B: int, N: int) -> Work:
    """Count the output row of every token."""
    num_a = (N + 1) // 2
    return Work({"best": B * num_a * FP32, "partner": B * num_a * INT32}, {"slots": B * N * INT32})


def nearest_match(B: int, N: int, C: int, K: int, dtype: torch.dtype) -> Work:
    """Count the output row of every token."""
    read = {"metric": B * N * C * dtype.itemsize, "kept": B * K * INT64}
    return Work(read, {"slots": B * N * INT32}, 2 * B * N * K * C)


def merge_order(B: int, N: int, R: int, *, has_size: bool = False) -> Work:
    """Count tokens by row, row starts and sizes."""
    read = {"slots": B * N * INT32} | _sizes(B, N, has_size)
    return Work(read, {"order": B * N * INT32, "starts": B * R * INT32, "out_size": B * R * FP32})


def merge_gather(
    B: int, N: int, D: int, R: int, dtype: torch.dtype, *, has_size: bool = False
) -> Work:
    """Count tokens moved to R rows."""
    read = {"tokens": B * N * D * dtype.itemsize, "order": B * N * INT32}
    read |= {"starts": B * R * INT32, "out_size": B * R * FP32} | _sizes(B, N, has_size)
    return Work(read, {"out": B * R * D * dtype.itemsize}, 2 * B * N * D)


def bipartite_merge_backward(
    B: int, N: int, D: int, r: int, dtype: torch.dtype, *, has_size: bool = False
) -> Work:
    """Count gradients of rows copied to tokens."""
    row, rows = D * dtype.itemsize, N - r
    read = {"grad_out": B * rows * row, "out_size": B * rows * FP32, "slots": B * N * INT32}
    return Work(read | _sizes(B, N, has_size), {"grad": B * N * row}, B * N * D)


def _sizes(B: int, N: int, has_size: bool) -> Bytes:
    return {"size": B * N * FP32} if has_size else {}


# Selection of diverse tokens


def select_diverse(B: int, N: int, D: int, K: int, dtype: torch.dtype) -> Work:
    """Return the work of `cosines` and `diverse`."""
    return together(cosines(B, N, D, dtype, has_nearest=True), diverse(B, N, D, K, dtype))


def select_dpp(
    B: int, N: int, D: int, K: int, dtype: torch.dtype, *, has_relevance: bool = False
) -> Work:
    """Return the work of `cosines` and `dpp`."""
    return together(cosines(B, N, D, dtype), dpp(B, N, K, has_relevance=has_relevance))


def cosines(B: int, N: int, D: int, dtype: torch.dtype, *, has_nearest: bool = False) -> Work:
    """Count the cosines of all pairs."""
    written = {"cosine": B * N * N * FP32}
    written |= {"nearest": _nearest(B, N, D, dtype)} if has_nearest else {}
    return Work({"tokens": B * N * D * dtype.itemsize}, written, 2 * B * N * N * D)


def diverse(B: int, N: int, D: int, K: int, dtype: torch.dtype) -> Work:
    """Count the nearest cosines of tiles, the diagonal, and a row per token but the last."""
    read = {"cosine": _cosine_rows(B, N, K - 1), "nearest": _nearest(B, N, D, dtype)}
    return Work(read, {"order": B * K * INT64})


def dpp(B: int, N: int, K: int, *, has_relevance: bool = False) -> Work:
    """Count the diagonal, a row per token, and the columns of the factor."""
    read = {"cosine": _cosine_rows(B, N, K)}
    read |= {"factor": B * (K - 1) * N * FP32} if K > 1 else {}
    read |= {"relevance": B * N * FP32} if has_relevance else {}
    written = {"order": B * K * INT64, "factor": B * K * N * FP32}
    return Work(read, written, B * N * K * (K - 1))


def _nearest(B: int, N: int, D: int, dtype: torch.dtype) -> int:
    """Return the bytes of the nearest cosine of each token in each tile."""
    return B * ceil(N / launch.bipartite_match(D, dtype.itemsize)["BLOCK_A"]) * N * FP32


def _cosine_rows(B: int, N: int, count: int) -> int:
    """Return the bytes of rows of cosines and of the rest of the diagonal."""
    return B * (count * N + N - count) * FP32
