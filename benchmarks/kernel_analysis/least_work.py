"""Minimum work of each op: bytes read and written by tensor, and operations.

The count contains the bytes that a launch reads and writes, each once, under the names of the
kernel's pointers: inputs, outputs, and what a launch stores for the next launch or the backward.
Rows that no output depends on are not counted: the CLS row that `cls` replaces, and dropped tokens
without merging. Parameter vectors of a block are not counted; they are a thousandth of its
matrices. Rows, weights, sizes and the query are fp32, slots int32, kept positions int64.

The work of an op with several launches is their sum. `score_reduce` reads the tokens twice, to
score and to move, because the tokens of an image do not fit one program. If several programs read
the same bytes, `tiled` counts the bytes that each of them reads (from L2 after the first).
Operations follow the op's FLOP formula; a multiply and an add are two.
"""

from collections import Counter
from math import ceil
from typing import NamedTuple

import torch

from elip_kernels import launch

FP32 = INT32 = 4
INT64 = 8


class Work(NamedTuple):
    """Bytes read and written by tensor, and operations."""

    read: dict[str, int]
    written: dict[str, int]
    operations: int

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
    p, size = num_prefix_tokens, dtype.itemsize
    rows = N if merge else p + K
    read = {"tokens": B * rows * D * size, "scores": B * (N - p) * FP32}
    written = {"out": B * (p + K + merge) * D * size, **_selection(B, N, K)}
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
    p, size = num_prefix_tokens, dtype.itemsize
    read = {"grad_out": B * (p + K + merge) * D * size, "slots": B * N * INT32}
    if merge:
        read["weights"] = B * N * FP32
    return Work(read, {"grad": B * N * D * size}, B * (N - p - K) * D if merge else 0)


def cls_attention(B: int, H: int, N: int, d: int, dtype: torch.dtype, *, group: int = 1) -> Work:
    """Return the work of `key_scores` and `row_of_keys`."""
    return together(key_scores(B, H, N, d, dtype, group=group), row_of_keys(B, H, N))


def key_scores(
    B: int, H: int, N: int, d: int, dtype: torch.dtype, *, group: int = 1, tiled: bool = False
) -> Work:
    """Count q, k, scores of tiles, with `group` q heads per k head. `tiled`: each tile reads q."""
    size, tiles = dtype.itemsize, max(1, ceil((N - 1) / launch.KEYS))
    read = {"q": B * H * d * size * (tiles if tiled else 1), "k": B * H // group * N * d * size}
    written = _scores(B, N, H, tiles) | {"cls_score": B * H * FP32}
    return Work(read, written, 2 * B * H * N * d)


def row_of_keys(B: int, H: int, N: int, *, tiled: bool = False) -> Work:
    """Count the row, which is computed from the scores of the tiles as in `row`."""
    read = _row_read(B, N, H, max(1, ceil((N - 1) / launch.KEYS)), tiled)
    return Work(read, {"out": B * N * FP32}, 0)


def attention_column_mean(
    B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype
) -> Work:
    """Return the work of `query_sums`, `key_sums` and `column_mean`, with G heads of keys."""
    shape = (B, H, G, M, N, d, dtype)
    return together(query_sums(*shape), key_sums(*shape), column_mean(B, G, N))


def query_sums(
    B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype, *, tiled: bool = False
) -> Work:
    """Count the log-sum-exp of queries, in whole tiles. `tiled`: each tile reads all its keys."""
    size, block = dtype.itemsize, launch.column_sums(d, dtype)["BLOCK_M"]
    T = ceil(M / block)
    read = {"q": B * H * M * d * size, "k": B * (H * T if tiled else G) * N * d * size}
    return Work(read, {"lse": B * H * T * block * FP32}, 2 * B * H * M * N * d)


def key_sums(
    B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype, *, tiled: bool = False
) -> Work:
    """Count what each key receives from its heads. `tiled`: each tile reads all their queries."""
    lse = query_sums(B, H, G, M, N, d, dtype).written["lse"]
    tiles = ceil(N / launch.column_sums(d, dtype)["BLOCK_N"]) if tiled else 1
    read = {"q": tiles * B * H * M * d * dtype.itemsize, "k": B * G * N * d * dtype.itemsize}
    return Work(read | {"lse": tiles * lse}, {"sums": B * G * N * FP32}, 2 * B * H * M * N * d)


def column_mean(B: int, G: int, N: int) -> Work:
    """Count the mean over the heads of keys."""
    return Work({"sums": B * G * N * FP32}, {"out": B * N * FP32}, 0)


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
    if has_text:
        read["text"] = B * D * size
    written = {"query": B * H * D * FP32, "cls_score": B * H * FP32}
    if normed:
        written["normed"] = B * D * FP32
    return Work(read, written, 4 * B * D * width + 2 * B * H * D)


def weights(B: int, N: int, D: int, H: int, dtype: torch.dtype, *, tiled: bool = False) -> Work:
    """Count patches and u read, weights of tiles written. `tiled`: each tile reads u."""
    read = _patches(B, N, D, H, dtype)
    read["query"] *= _tiles(B, N, D, H, dtype) if tiled else 1
    return Work(read, _weights(B, N, D, H, dtype), 2 * B * H * (N - 1) * D)


def weigh(B: int, N: int, D: int, H: int, dtype: torch.dtype, *, tiled: bool = False) -> Work:
    """Count patches, weights and normalised CLS read; a sum of tokens per head and part written.

    `tiled`: slices of D read the weights, parts read the statistics of tiles, and each group of 16
    heads reads the tokens.
    """
    settings, parts = launch.weigh(_tokens(B, N, D, dtype)), max(1, ceil((N - 1) / launch.PART))
    slices = ceil(D / settings["BLOCK_D"]) if tiled else 1
    groups, every = (ceil(H / settings["BLOCK_H"]), slices * parts) if tiled else (1, 1)
    times = {"tops": every, "totals": every, "shifts": every, "means": slices * groups}
    read = {n: times.get(n, slices) * v for n, v in _weights(B, N, D, H, dtype).items()}
    read |= {"tokens": groups * B * (N - 1) * D * dtype.itemsize, "cls": groups * B * D * FP32}
    read["cls_score"] = every * B * H * FP32
    return Work(read, {"out": parts * B * H * D * FP32}, 2 * B * H * N * D)


def value(
    B: int,
    N: int,
    D: int,
    H: int,
    dtype: torch.dtype,
    *,
    width: int | None = None,
    tiled: bool = False,
) -> Work:
    """Count sums of tokens, W_v and the output. `tiled`: each sixteen images read W_v."""
    width, parts = width or D, max(1, ceil((N - 1) / launch.PART))
    block_b = launch.value(width // H, dtype, _tokens(1, 1, D, dtype))["BLOCK_B"] if tiled else B
    matrix = ceil(B / block_b) * width * D * dtype.itemsize
    read = {"means": parts * B * H * D * FP32, "v_weight": matrix}
    return Work(read, {"out": B * width * dtype.itemsize}, 2 * B * D * width)


def select_row(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Work:
    """Count the row and its selection."""
    made = row(B, N, D, H, dtype)
    return made._replace(written={"row": made.written["out"], **_selection(B, N, K)})


def move(
    B: int,
    N: int,
    D: int,
    K: int,
    dtype: torch.dtype,
    *,
    merge: bool = True,
    tiled: bool = False,
) -> Work:
    """Count tokens moved to their rows. `tiled`: each slice of D reads slots and weights."""
    row_size = B * D * dtype.itemsize
    slices = ceil(D / launch.move(N, dtype.itemsize).block_d) if tiled else 1
    read = {"tokens": (N if merge else K + 1) * row_size, "slots": slices * B * N * INT32}
    if merge:
        read["weights"] = slices * B * N * FP32
    written = {"out": (K + 1 + merge) * row_size}
    return Work(read, written, 2 * B * (N - 1 - K) * D if merge else 0)


def score_tiles(B: int, N: int, D: int, H: int, dtype: torch.dtype, *, tiled: bool = False) -> Work:
    """Count scores of patches, and each tile's maximum and sum. `tiled`: each tile reads u."""
    tiles, read = _tiles(B, N, D, H, dtype), _patches(B, N, D, H, dtype)
    read["query"] *= tiles if tiled else 1
    return Work(read, _scores(B, N, H, tiles), 2 * B * H * (N - 1) * D)


def row(B: int, N: int, D: int, H: int, dtype: torch.dtype, *, tiled: bool = False) -> Work:
    """Count the row from the scores of tiles. `tiled`: each part reads the statistics of tiles."""
    read = _row_read(B, N, H, _tiles(B, N, D, H, dtype), tiled)
    return Work(read, {"out": B * N * FP32}, 0)


def select(B: int, N: int, K: int, *, num_prefix_tokens: int = 1) -> Work:
    """Count scores read and positions written."""
    read = {"scores": B * (N - num_prefix_tokens) * FP32}
    return Work(read, {"kept": B * K * INT64}, 0)


def _patches(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that scoring reads."""
    return {"tokens": B * (N - 1) * D * dtype.itemsize, "query": B * H * D * FP32}


def _tokens(B: int, N: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """Return tokens on the meta device, to read the configuration in launch.py."""
    return torch.empty(B, N, D, dtype=dtype, device="meta")


def _tiles(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> int:
    """Return the number of tiles of patches per image."""
    return ceil((N - 1) / launch.score_tiles(H, _tokens(B, N, D, dtype))["BLOCK_N"])


def _weights(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of the weights of tiles, with a rest of each for two-byte tokens."""
    block_n = launch.weight_tiles(H, _tokens(B, N, D, dtype))["BLOCK_N"]
    heads = B * H * ceil((N - 1) / block_n)
    left = {"weights": heads * block_n * dtype.itemsize, "tops": heads * FP32}
    left["totals"] = heads * FP32
    if dtype == torch.float32:
        return left | {"means": B * (N - 1) * FP32}
    return left | {"rests": left["weights"], "shifts": heads * FP32}


def _row_read(B: int, N: int, H: int, tiles: int, tiled: bool) -> dict[str, int]:
    """Return the bytes that the parts of a row read."""
    pieces = max(1, ceil((N - 1) / launch.row(N - 1, tiles)[0])) if tiled else 1
    read = _scores(B, N, H, tiles) | {"cls_score": B * H * FP32}
    return read | {name: pieces * n for name, n in read.items() if name != "scores"}


def _scores(B: int, N: int, H: int, tiles: int) -> dict[str, int]:
    """Return the bytes that the tiles store."""
    totals = B * H * tiles * FP32
    return {"scores": B * H * (N - 1) * FP32, "tops": totals, "totals": totals}


def _selection(B: int, N: int, K: int) -> dict[str, int]:
    """Return the bytes that a selection writes."""
    return {"kept": B * K * INT64, "weights": B * N * FP32, "slots": B * N * INT32}


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
    tiles = _row_tiles(N, D, dtype)
    read = {"tokens": B * N * D * dtype.itemsize * (2 * tiles - 1 if tiled else 1)}
    written = {"cosine": B * N * N * FP32}
    if has_nearest:
        written["nearest"] = B * tiles * N * FP32
    return Work(read, written, 2 * B * N * N * D)


def diverse(B: int, N: int, D: int, K: int, dtype: torch.dtype) -> Work:
    """Count the nearest cosines of tiles, the diagonal, and a row per token but the last."""
    read = {"cosine": _cosine_rows(B, N, K - 1), "nearest": B * _row_tiles(N, D, dtype) * N * FP32}
    return Work(read, {"order": B * K * INT64}, 0)


def dpp(B: int, N: int, K: int, *, has_relevance: bool = False) -> Work:
    """Count the diagonal, a row per token, and the columns of the factor."""
    read = {"cosine": _cosine_rows(B, N, K)}
    if K > 1:
        read["factor"] = B * (K - 1) * N * FP32
    if has_relevance:
        read["relevance"] = B * N * FP32
    written = {"order": B * K * INT64, "factor": B * K * N * FP32}
    return Work(read, written, B * N * K * (K - 1))


def _row_tiles(N: int, D: int, dtype: torch.dtype) -> int:
    return ceil(N / launch.bipartite_match(D, dtype.itemsize)[0])


def _cosine_rows(B: int, N: int, count: int) -> int:
    """Return the bytes of rows of cosines and of the rest of the diagonal."""
    return B * (count * N + N - count) * FP32
