"""Configurations that `tune.py` tries, and the calls that it times."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from benchmarks.cases import DEVICE, DTYPE_NAMES, HEADS, WIDTH
from elip_kernels._example import EXAMPLES, Sizes, map_tensors
from elip_kernels.testing import RecordedCalls

PUBLIC = {
    "reduce_backward": "reduce",
    "bipartite_match": "bipartite_merge",
    "bipartite_merge_backward": "bipartite_merge",
    "nearest_match": "merge_nearest",
}
"""The public op that calls an op of another name."""
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
    """Batch of a ViT-B: images, tokens per image, dtype; 65% of patches kept, 35% merged."""

    B: int
    N: int
    dtype: torch.dtype

    @property
    def kept(self) -> int:
        """Return the number of kept patches."""
        return max(1, int(0.65 * (self.N - 1)))

    def __str__(self) -> str:
        return f"B{self.B}-N{self.N}-{DTYPE_NAMES[self.dtype]}"


TILE = {"BLOCK_D": (0.5, 1.0, 2.0), "num_warps": (4, 8, 16)}
SLICE = {"BLOCK_D": (0.5, 1.0, 2.0), "num_warps": (4, 8)}
ROWS = {"BLOCK_N": (0.5, 1.0, 2.0)} | SLICE
PAIRS = {"BLOCK_A": (16, 32, 64), "BLOCK_B": (32, 64), "num_warps": (4, 8)}
ORDER = {"BLOCK_N": (0.5, 1.0), "BLOCK_M": (0.5, 1.0), "num_warps": (4, 8)}
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
    Sweep("bipartite_match", "bipartite_match", PAIRS),
    Sweep("bipartite_merge", "order_by_row", ORDER),
    Sweep("bipartite_merge", "merge_gather", {"BLOCK_R": (0.5, 1.0, 2.0)} | SLICE),
    Sweep("nearest_match", "bipartite_match", PAIRS),
    Sweep("bipartite_merge_backward", "reduce_backward", ROWS),
)
SIZES = ((256, 257), (256, 197), (64, 257), (16, 257), (1, 257), (64, 197), (64, 577), (256, 577))
SHAPES = (
    *(Shape(B, N, torch.bfloat16) for B, N in SIZES),
    *(Shape(64, N, torch.float32) for N in (257, 577)),
)


def arguments(op: str, shape: Shape) -> tuple[Any, ...]:
    """Return the arguments of `torch.ops.elip.<op>`, as the example of its public op calls it."""
    example = EXAMPLES[PUBLIC.get(op, op)]
    sizes = Sizes(shape.B, shape.N, WIDTH, shape.kept, HEADS, shape.dtype)
    with RecordedCalls() as recorded:
        example.outputs(map_tensors(lambda tensor: tensor.to(DEVICE), example.arguments(sizes)))
    return dict(reversed(recorded.calls))[op]
