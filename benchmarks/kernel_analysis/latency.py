"""A model of time: what a launch takes by its bytes, its waits for memory, and launching itself.

    seconds = LAUNCH + max(bytes / bandwidth, waves * waits * latency)

bytes: of the tensors that a launch is given, each once. waves: in how many turns its programs run,
as many at once as the occupancy lets. waits: how often a program waits for loads that are under way
together, as `waits.py` defines and counts them; `WAITS` states them of every kernel from the
arguments of a launch, and tests/interpreted/test_waits.py holds it to what is counted.

Sources. Processors and bandwidths: the vendors' data sheets. Latency of a load from memory, by a
pointer chase: RRZE-HPC/gpu-benches at 1038c5d, gpu-latency: 688 cycles at 1,980 MHz on a GH200,
whose GPU is an H100 with HBM3, and 890 cycles at 2,092 MHz on an MI300X; B200: 860 cycles in the
README of markdewing/AI_kernels at 0d701ad, which says 700 of an H100 SXM and nothing of the clock:
1,965 MHz is taken. A launch: gpu-small-kernels of the former: a kernel of 64 KB in a CUDA graph
takes 1.3 us on an H200, of which a wait for L2, 142 ns on the GH200, is no launch.

Not in the model: caches, though a load that hits the L2 waits less than half as long, and one that
hits the L1 still less, so what was read or written before comes sooner than predicted; and the
arithmetic, barriers and reductions between two waits, such as the bisection of a selection, so the
next one comes later. Not known: a launch elsewhere than on an H200; latency under load, and on an
H200, for which the H100's is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks.kernel_analysis.compile import Arch, RecordedLaunch

LAUNCH = 1.2e-6  # seconds, in a CUDA graph


class Machine(NamedTuple):
    """Its name as its driver says it, without the vendor; SMs or CUs, bytes a second, and the
    seconds that a load from memory takes.
    """

    name: str
    arch: Arch
    processors: int
    bandwidth: float
    latency: float


ALL_MACHINES = (
    Machine("H100 80GB HBM3", 90, 132, 3.35e12, 688 / 1.98e9),  # the SXM card
    Machine("H200", 90, 132, 4.8e12, 688 / 1.98e9),
    Machine("B200", 100, 148, 8.0e12, 860 / 1.965e9),
    Machine("Instinct MI300X", "gfx942", 304, 5.3e12, 890 / 2.092e9),
)
MACHINES = {machine.arch: machine for machine in reversed(ALL_MACHINES)}


class LaunchSize(NamedTuple):
    """Of a launch: its programs, how often they wait, the bytes of its tensors."""

    programs: int
    waits: int
    bytes: int


def size_of(launch: RecordedLaunch) -> LaunchSize:
    """What a launch is, which need not run."""
    tensors = (t for t in launch.arguments.values() if isinstance(t, torch.Tensor))
    waits = modelled_waits(launch.name, launch.arguments | launch.options)
    return LaunchSize(prod(launch.grid), waits, sum(t.nbytes for t in tensors))


def waves(size: LaunchSize, at_once: int, machine: Machine) -> int:
    """In how many turns a machine runs the programs, `at_once` on each SM or CU."""
    return ceil(size.programs / (at_once * machine.processors))


def bound(size: LaunchSize, at_once: int, machine: Machine) -> tuple[float, float]:
    """Seconds of a launch: those of its bytes alone, and those of the model."""
    roof = size.bytes / machine.bandwidth
    waited = waves(size, at_once, machine) * size.waits * machine.latency
    return roof, LAUNCH + max(roof, waited)


def modelled_waits(
    kernel: str, arguments: Mapping[str, Any], row_sizes: Sequence[int] | None = None
) -> int:
    """What `WAITS` says of a launch; `row_sizes`: how many tokens each row of a program of a merge has,
    by default as many as any other.
    """
    given = SimpleNamespace(**{"num_stages": 3, "row_sizes": row_sizes} | dict(arguments))
    return WAITS[kernel](given)


def _steps(length: int, block: int) -> int:
    return ceil(length / block)


def _pipelined(trips: int, a: Any) -> int:
    """A loop around a product."""
    return ceil(trips / max(1, a.num_stages - 1))


def _shares(a: Any) -> int:
    """The CLS token, and a text."""
    return ceil(_steps(a.D, a.BLOCK_R) / 2)


def _query(a: Any) -> int:
    """CLS twice for its moments, both matrices, and W_k again for u."""
    slices = ceil(_steps(a.D, a.BLOCK_D) / max(1, a.STAGES - 1))
    return 2 * _shares(a) + 2 * slices + (a.q_bias_ptr is not None)


def _weigh(a: Any) -> int:
    """What all tiles add up to, and the tiles of a part."""
    return max(1, _steps(a.T, a.BLOCK_T)) + _pipelined(a.TILES, a)


def _value(a: Any) -> int:
    """Parts of m with the rows of W_v, and a bias."""
    slices = ceil(a.P * _steps(a.D, a.BLOCK_D) / max(1, a.STAGES - 1))
    return slices + (a.v_bias_ptr is not None)


def _merge(a: Any) -> int:
    """Where rows begin; which tokens a full round takes, and these; which tokens the first of the
    other rounds takes, and those of each.
    """
    row_sizes = a.row_sizes or [ceil(a.N / a.R)] * min(a.R, a.BLOCK_R)
    full, rest = sum(n // a.BLOCK_R for n in row_sizes), max(n % a.BLOCK_R for n in row_sizes)
    return 1 + 2 * full + (1 + rest if rest else 0)


def _lse(a: Any) -> int:
    """A mask of keys in every tile; a mask of queries before them all."""
    tiles = _steps(a.N, a.BLOCK_N)
    return a.HAS_QUERY_MASK + (tiles if a.HAS_MASK else _pipelined(tiles, a))


WAITS: dict[str, Callable[[Any], int]] = {
    "_query_kernel": _query,
    "scores_kernel": lambda a: _pipelined(_steps(a.D, a.BLOCK_K), a),
    "_row_kernel": lambda a: _steps(a.H, a.BLOCK_H),
    "_score_select_kernel": lambda a: _steps(a.H, a.BLOCK_H),
    "_keys_kernel": lambda a: _steps(a.GROUP, 2),  # the next query is under way
    "_lse_kernel": _lse,
    "_sums_kernel": lambda a: a.HAS_MASK + a.GROUP * _steps(a.M, a.BLOCK_M),
    "_mean_kernel": lambda a: a.HAS_QUERY_MASK * _steps(a.M, a.BLOCK_M) + _steps(a.G, a.BLOCK_G),
    "_weights_kernel": lambda a: _pipelined(_steps(a.D, a.BLOCK_K), a),
    "_weigh_kernel": _weigh,
    "_value_kernel": _value,
    "_fuse_kernel": lambda a: _shares(a) + _steps(a.D, a.BLOCK_R) + _steps(a.D, a.BLOCK_D),
    "_select_kernel": lambda a: 1,
    "_stream_kernel": lambda a: (5 + (a.MERGE and a.NORMALIZE)) * _steps(a.N, a.BLOCK_N),
    "_move_kernel": lambda a: (2 - a.MERGE) * _steps(a.N, a.BLOCK_N),  # else slots come first
    "_reduce_fwd_kernel": lambda a: 2 if a.P or not a.MERGE else 1,  # prefix tokens come last
    "_reduce_bwd_kernel": lambda a: 2,  # slots, rows
    "_match_kernel": lambda a: (
        _steps(a.N // 2, a.BLOCK_B) * _pipelined(_steps(a.C, a.BLOCK_C), a) + a.HAS_PENALTY
    ),
    "_slots_kernel": lambda a: 1,
    "_slots_of_kernel": lambda a: a.BITS + 1,
    "_nearest_kernel": lambda a: 1 + _steps(a.K, a.BLOCK_K) * _pipelined(_steps(a.C, a.BLOCK_C), a),
    "_order_kernel": lambda a: _steps(a.N, a.BLOCK_M),
    "_merge_fwd_kernel": _merge,
    "_merge_bwd_kernel": lambda a: 2,  # slots, rows
}
