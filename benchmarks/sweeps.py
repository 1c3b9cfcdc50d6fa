"""Configurations that `tune.py` tries, and the calls that it times."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, DTYPE_NAMES, HEADS, WIDTH
from elip_kernels.ops.absorbed_query import QueryArguments

CHANNELS = WIDTH // HEADS
Number = int | float


@dataclass(frozen=True)
class Sweep:
    """Values to try for one op.

    Attributes:
        op: name of the op in `torch.ops.elip`.
        table: function of elip_kernels/launch.py whose result is changed.
        axes: values by field, or by position for a tuple. An int replaces the number, a float
            scales it.
    """

    op: str
    table: str
    axes: dict[str | int, tuple[Number, ...]]

    def __str__(self) -> str:
        return f"{self.op}.{self.table}"

    def candidates(self) -> list[dict[str | int, Number]]:
        """Return every combination."""
        return [
            dict(zip(self.axes, numbers, strict=True)) for numbers in product(*self.axes.values())
        ]


@dataclass(frozen=True)
class Shape:
    """Batch of a ViT-B: images, tokens per image, dtype; 65% of patches kept, 25% merged."""

    B: int
    N: int
    dtype: torch.dtype

    @property
    def kept(self) -> int:
        """Return the number of kept patches."""
        return max(1, int(0.65 * (self.N - 1)))

    @property
    def merged(self) -> int:
        """Return the number of merged tokens."""
        return self.N // 4

    def __str__(self) -> str:
        return f"B{self.B}-N{self.N}-{DTYPE_NAMES[self.dtype]}"


TILE = {"block_d": (0.5, 1.0, 2.0), "num_warps": (4, 8, 16)}
ROWS = {"block_n": (0.5, 1.0, 2.0), "block_d": (0.5, 1.0, 2.0), "num_warps": (4, 8)}
QUERY = {"BLOCK_D": (32, 64, 128), "num_warps": (4, 8), "STAGES": (3, 5, 7)}
TILES = {"BLOCK_N": (32, 64, 128), "BLOCK_K": (0.5, 1.0), "num_warps": (4, 8), "num_stages": (3, 4)}
COLUMN_SUMS = {"BLOCK_M": (0.5, 1.0, 2.0), "BLOCK_N": (0.5, 1.0, 2.0)}
COLUMN_SUMS |= {"num_warps": (4, 8), "num_stages": (2, 3)}
WEIGH = {"BLOCK_D": (0.5, 1.0, 2.0), "num_warps": (4, 8), "num_stages": (2, 3)}
SWEEPS = (
    Sweep("reduce", "reduce_forward", TILE),
    Sweep("reduce_backward", "reduce_backward", ROWS),
    Sweep("score_reduce", "query", QUERY),
    Sweep("score_reduce", "score_tiles", TILES),
    Sweep("score_reduce", "select", {2: (0.5, 1.0, 2.0)}),
    Sweep("score_reduce", "move", TILE),
    Sweep("cls_attention_output", "weight_tiles", TILES),
    Sweep("cls_attention_output", "weigh", WEIGH),
    Sweep("cls_attention_output", "value", QUERY),
    Sweep("attention_column_mean", "column_sums", COLUMN_SUMS),
    Sweep("bipartite_match", "bipartite_match", {0: (16, 32, 64), 1: (32, 64), 3: (4, 8)}),
    Sweep("bipartite_merge", "merge_order", {0: (0.5, 1.0), 1: (0.5, 1.0), 2: (4, 8)}),
    Sweep("bipartite_merge", "merge_gather", ROWS),
    Sweep("nearest_match", "bipartite_match", {0: (16, 32, 64), 1: (32, 64), 3: (4, 8)}),
    Sweep("bipartite_merge_backward", "reduce_backward", ROWS),
)
SIZES = ((256, 257), (256, 197), (64, 257), (16, 257), (1, 257), (64, 197), (64, 577), (256, 577))
SHAPES = (
    *(Shape(B, N, torch.bfloat16) for B, N in SIZES),
    *(Shape(64, N, torch.float32) for N in (257, 577)),
)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random tensor on the measured device."""
    return torch.randn(*shape, device=DEVICE).to(dtype)


def arguments(op: str, shape: Shape) -> tuple[Any, ...]:
    """Return the arguments of `torch.ops.elip.<op>`."""
    B, N, dtype = shape.B, shape.N, shape.dtype
    tokens, K, r = random(B, N, WIDTH, dtype=dtype), shape.kept, shape.merged
    if op in ("reduce", "reduce_backward"):
        selecting = (tokens, random(B, N).softmax(1)[:, 1:], None, K, 1, True)
        if op == "reduce":
            return selecting
        out, _, weights, slots = torch.ops.elip.reduce(*selecting)
        return torch.randn_like(out), slots, weights, True
    if op == "attention_column_mean":
        q, k = random(2, B, HEADS, N, CHANNELS, dtype=dtype)
        return q, k, None, None, CHANNELS**-0.5
    if op.startswith("bipartite"):
        matching = (random(B, N, CHANNELS, dtype=dtype), None, r, 1)
        if op == "bipartite_match":
            return matching
        size, slots = torch.ones(B, N, device=DEVICE), torch.ops.elip.bipartite_match(*matching)
        if op == "bipartite_merge":
            return tokens, size, slots, N - r
        out, out_size = torch.ops.elip.bipartite_merge(tokens, size, slots, N - r)
        return torch.randn_like(out), size, out_size, slots
    if op == "nearest_match":
        kept = torch.ops.elip.select(random(B, N - 1), None, K, 1)
        return random(B, N, CHANNELS, dtype=dtype), kept, 1
    cls, text = random(2, B, WIDTH, dtype=dtype)
    gamma, beta, bias = random(3, WIDTH, dtype=dtype)
    matrices = random(3, WIDTH, WIDTH, dtype=dtype) / WIDTH**0.5
    query = QueryArguments(
        *(cls, text, 0.8, False, gamma, beta, 1e-6),
        *(matrices[0], bias, matrices[1], HEADS, CHANNELS**-0.5),
    )
    if op == "cls_attention_output":
        return tokens, *query, matrices[2], bias
    return tokens, *query, K, True, None, None
