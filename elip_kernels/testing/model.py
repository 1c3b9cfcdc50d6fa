"""The least that an op must do: bytes across the memory, tensor by tensor, and operations.

Counted is what a launch reads and writes, each byte once, under the names of the kernel's pointers:
inputs, outputs, and what one launch leaves for the next or for the backward pass. Rows on which
no output depends are not: the CLS row that `cls` replaces, dropped tokens when nothing merges.
Not counted are vectors of a block's parameters, a thousandth of its matrices. Rows, weights, sizes
and the query are fp32, slots int32, kept positions int64.

An op of several launches is their sum: `score_reduce` reads the tokens twice, once to score and
once to move, since an image's tokens do not fit one program. Where a tiling lets programs read the
same bytes, `tiled` counts what each of them reads, as launched: from L2 after the first.
Operations are those of the op's FLOP formula, a multiply and an add being two.
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
        """All bytes that cross the memory, read and written."""
        return sum(self.read.values()) + sum(self.written.values())


def together(*launches: Work) -> Work:
    """The work of launches that follow one another."""
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
    """Without merging, only the tokens that stay are needed."""
    p, size = num_prefix_tokens, dtype.itemsize
    rows = N if merge else p + K
    read = {"tokens": B * rows * D * size, "scores": B * (N - p) * FP32}
    written = {"out": B * (p + K + merge) * D * size, **_selection(B, N, K)}
    return Work(read, written, 2 * B * (N - p - K) * D * merge)


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
    """A weight is needed only where there is a merged row to take it of."""
    p, size = num_prefix_tokens, dtype.itemsize
    read = {"grad_out": B * (p + K + merge) * D * size, "slots": B * N * INT32}
    if merge:
        read["weights"] = B * N * FP32
    return Work(read, {"grad": B * N * D * size}, B * (N - p - K) * D * merge)


def cls_attention(B: int, H: int, N: int, d: int, dtype: torch.dtype, *, group: int = 1) -> Work:
    """`key_scores`, and `row`."""
    return together(key_scores(B, H, N, d, dtype, group=group), row_of_keys(B, H, N))


def key_scores(
    B: int, H: int, N: int, d: int, dtype: torch.dtype, *, group: int = 1, tiled: bool = False
) -> Work:
    """q and k in, `group` query heads to one of k; scores, and each tile's maximum and sum out.
    `tiled`: each tile reads q."""
    size, tiles = dtype.itemsize, max(1, ceil((N - 1) / launch.KEYS))
    read = {"q": B * H * d * size * (tiles if tiled else 1), "k": B * H // group * N * d * size}
    written = _scores(B, N, H, tiles) | {"cls_score": B * H * FP32}
    return Work(read, written, 2 * B * H * N * d)


def row_of_keys(B: int, H: int, N: int, *, tiled: bool = False) -> Work:
    """The row from the scores of the tiles, as `row`."""
    read = _row_read(B, N, H, max(1, ceil((N - 1) / launch.KEYS)), tiled)
    return Work(read, {"out": B * N * FP32}, 0)


def attention_received(B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype) -> Work:
    """`query_sums`, `key_sums`, `received_mean`; G heads of keys."""
    shape = (B, H, G, M, N, d, dtype)
    return together(query_sums(*shape), key_sums(*shape), received_mean(B, G, N))


def query_sums(
    B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype, *, tiled: bool = False
) -> Work:
    """The log-sum-exp of whole tiles of queries. `tiled`: each tile reads all keys of its head."""
    size, block = dtype.itemsize, launch.received(d, dtype)["BLOCK_M"]
    T = ceil(M / block)
    read = {"q": B * H * M * d * size, "k": B * (H * T if tiled else G) * N * d * size}
    return Work(read, {"lse": B * H * T * block * FP32}, 2 * B * H * M * N * d)


def key_sums(
    B: int, H: int, G: int, M: int, N: int, d: int, dtype: torch.dtype, *, tiled: bool = False
) -> Work:
    """What keys receive of the heads that read them. `tiled`: each tile reads all their queries."""
    lse = query_sums(B, H, G, M, N, d, dtype).written["lse"]
    tiles = ceil(N / launch.received(d, dtype)["BLOCK_N"]) if tiled else 1
    read = {"q": tiles * B * H * M * d * dtype.itemsize, "k": B * G * N * d * dtype.itemsize}
    return Work(read | {"lse": tiles * lse}, {"sums": B * G * N * FP32}, 2 * B * H * M * N * d)


def received_mean(B: int, G: int, N: int) -> Work:
    """The mean of what the heads of keys receive."""
    return Work({"sums": B * G * N * FP32}, {"out": B * N * FP32}, 0)


def cls_attention_from_tokens(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """`query`, `score_tiles`, `row`, under one name each for what is not handed on."""
    tiles = score_tiles(B, N, D, H, dtype)
    return together(query(B, D, H, dtype), tiles, row(B, N, D, H, dtype))


def cls_attend_from_tokens(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """`query`, and `attend`."""
    return together(query(B, D, H, dtype, normed=True), attend(B, N, D, H, dtype))


def score_reduce(
    B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype, *, merge: bool = True
) -> Work:
    """`query`, `score_tiles`, `select_row`, `move`."""
    first = together(query(B, D, H, dtype), score_tiles(B, N, D, H, dtype))
    second = together(select_row(B, N, D, K, H, dtype), move(B, N, D, K, dtype, merge=merge))
    return together(first, second)


def fuse_text(B: int, N: int, D: int, dtype: torch.dtype, *, text_for_all: bool = False) -> Work:
    """Tokens and texts in, the tokens of a dry run out."""
    size = dtype.itemsize
    read = {"tokens": B * N * D * size, "text": (1 if text_for_all else B) * D * size}
    return Work(read, {"out": B * N * D * size}, 0)


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
    """CLS tokens, texts and two matrices (`width`, D) in; u and the CLS token's scores out."""
    size, width = dtype.itemsize, width or D
    read = {"cls": B * D * size, "q_weight": width * D * size, "k_weight": width * D * size}
    if has_text:
        read["text"] = B * D * size
    written = {"query": B * H * D * FP32, "cls_score": B * H * FP32}
    if normed:
        written["normed"] = B * D * FP32
    return Work(read, written, 4 * B * D * width + 2 * B * H * D)


def attend(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> Work:
    """Patches, u and CLS normalised in, a sum of normalised tokens a head out."""
    read = _patches(B, N, D, H, dtype) | {"cls_score": B * H * FP32, "cls": B * D * FP32}
    return Work(read, {"out": B * H * D * FP32}, 4 * B * H * N * D - 2 * B * H * D)


def select_row(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Work:
    """The row, and what it selects."""
    made = row(B, N, D, H, dtype)
    return made._replace(written={"row": made.written["out"], **_selection(B, N, K)})


def move(B: int, N: int, D: int, K: int, dtype: torch.dtype, *, merge: bool = True) -> Work:
    """Tokens to the rows that were selected."""
    row_size = B * D * dtype.itemsize
    read = {"tokens": (N if merge else K + 1) * row_size, "slots": B * N * INT32}
    if merge:
        read["weights"] = B * N * FP32
    written = {"out": (K + 1 + merge) * row_size}
    return Work(read, written, 2 * B * (N - 1 - K) * D * merge)


def score_tiles(B: int, N: int, D: int, H: int, dtype: torch.dtype, *, tiled: bool = False) -> Work:
    """Scores of the patches, and each tile's maximum and sum. `tiled`: each tile reads u."""
    tiles, read = _tiles(B, N, D, H, dtype), _patches(B, N, D, H, dtype)
    read["query"] *= tiles if tiled else 1
    return Work(read, _scores(B, N, H, tiles), 2 * B * H * (N - 1) * D)


def row(B: int, N: int, D: int, H: int, dtype: torch.dtype, *, tiled: bool = False) -> Work:
    """The row from the scores of the tiles; CLS's own were made with the query. `tiled`: each piece
    of a row reads what the tiles add up to."""
    read = _row_read(B, N, H, _tiles(B, N, D, H, dtype), tiled)
    return Work(read, {"out": B * N * FP32}, 0)


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


def select(B: int, N: int, K: int, *, num_prefix_tokens: int = 1) -> Work:
    """Scores in, positions out."""
    read = {"scores": B * (N - num_prefix_tokens) * FP32}
    return Work(read, {"kept": B * K * INT64}, 0)


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


def _patches(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> dict[str, int]:
    """What scoring reads."""
    return {"tokens": B * (N - 1) * D * dtype.itemsize, "query": B * H * D * FP32}


def _tiles(B: int, N: int, D: int, H: int, dtype: torch.dtype) -> int:
    """Tiles of patches an image."""
    tokens = torch.empty(B, N, D, dtype=dtype, device="meta")
    return ceil((N - 1) / launch.score_tiles(H, tokens)["BLOCK_N"])


def _row_read(B: int, N: int, H: int, tiles: int, tiled: bool) -> dict[str, int]:
    """What pieces of a row read."""
    pieces = max(1, ceil((N - 1) / launch.row(N - 1, tiles)[0])) if tiled else 1
    read = _scores(B, N, H, tiles) | {"cls_score": B * H * FP32}
    return read | {name: pieces * n for name, n in read.items() if name != "scores"}


def _scores(B: int, N: int, H: int, tiles: int) -> dict[str, int]:
    """What the tiles leave behind."""
    totals = B * H * tiles * FP32
    return {"scores": B * H * (N - 1) * FP32, "tops": totals, "totals": totals}


def _selection(B: int, N: int, K: int) -> dict[str, int]:
    """What a selection leaves behind."""
    return {"kept": B * K * INT64, "weights": B * N * FP32, "slots": B * N * INT32}
