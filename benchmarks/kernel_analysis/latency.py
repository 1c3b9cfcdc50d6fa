"""Predict the time of a launch from its bytes, its waits for memory and the launch overhead.

    seconds = LAUNCH + max(bytes / bandwidth, waves * waits * latency)

bytes: of all tensors of the launch, each counted once. waves: the number of turns in which the
programs run, given the occupancy. waits: how often a program waits for loads, as defined in
`waits.py`. `WAITS` computes the waits of a kernel from the arguments of a launch;
tests/interpreted/test_waits.py compares them with the counted ones. A kernel that it does not have
counts as one that waits once, so its predicted time is a lower bound.

Sources. Processors and bandwidths: data sheets of the vendors. Latency of a load from memory, by a
pointer chase: RRZE-HPC/gpu-benches at 1038c5d, gpu-latency: 688 cycles at 1,980 MHz on a GH200 (its
GPU is an H100 with HBM3), 890 cycles at 2,092 MHz on an MI300X. B200: 860 cycles in the README of
markdewing/AI_kernels at 0d701ad, which reports 700 for an H100 SXM and no clock; 1,965 MHz is
assumed. Launch: gpu-small-kernels of gpu-benches: a kernel of 64 KB in a CUDA graph takes 1.3 us on
an H200, minus one wait for L2, 142 ns on the GH200.

Not modelled: cache hits, which make a launch faster than predicted; arithmetic, barriers and
reductions between two waits, which make it slower. Not known: the launch overhead of other machines
than the H200; the latency under load; the latency of an H200, for which that of the H100 is used.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks.kernel_analysis.compile import Arch, RecordedLaunch

LAUNCH = 1.2e-6  # seconds, in a CUDA graph


class Machine(NamedTuple):
    """One GPU: name in the driver without vendor, SMs or CUs, bytes/s, load latency in s."""

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
    """Programs of a launch, waits of a program, and bytes of its tensors."""

    programs: int
    waits: int
    bytes: int


def size_of(launch: RecordedLaunch) -> LaunchSize:
    """Return the size of a recorded launch, which need not run."""
    tensors = (t for t in launch.arguments.values() if isinstance(t, torch.Tensor))
    waits = modelled_waits(launch.name, launch.arguments | launch.options)
    return LaunchSize(prod(launch.grid), waits, sum(t.nbytes for t in tensors))


def waves(size: LaunchSize, at_once: int, machine: Machine) -> int:
    """Return in how many turns a machine runs the programs, `at_once` on each SM or CU."""
    return ceil(size.programs / (at_once * machine.processors))


def bound(size: LaunchSize, at_once: int, machine: Machine) -> tuple[float, float]:
    """Return the seconds of a launch by its bytes alone, and by the model."""
    roof = size.bytes / machine.bandwidth
    waited = waves(size, at_once, machine) * size.waits * machine.latency
    return roof, LAUNCH + max(roof, waited)


def modelled_waits(
    kernel: str, arguments: Mapping[str, Any], row_sizes: Sequence[int] | None = None
) -> int:
    """Return the waits that `WAITS` computes for a launch.

    Args:
        kernel: name of the kernel.
        arguments: arguments and options of the launch, by name.
        row_sizes: tokens of each row of a program of `_merge_fwd_kernel`; equal by default.
    """
    if kernel not in WAITS:
        return 1
    launch = SimpleNamespace(**{"num_stages": 3, "row_sizes": row_sizes} | dict(arguments))
    return WAITS[kernel](launch)


def _steps(length: int, block: int) -> int:
    return ceil(length / block)


def _pipelined(trips: int, a: Any) -> int:
    """Return the waits of a loop around a product."""
    return ceil(trips / max(1, a.num_stages - 1))


def _shares(a: Any) -> int:
    """Return the waits for the CLS token and a text."""
    return ceil(_steps(a.D, a.BLOCK_R) / 2)


def _query(a: Any) -> int:
    """Return the waits for CLS, twice for its moments, both matrices, and W_k again for u."""
    slices = ceil(_steps(a.D, a.BLOCK_D) / max(1, a.STAGES - 1))
    return 2 * _shares(a) + 2 * slices + int(a.q_bias_ptr is not None)


def _weigh(a: Any) -> int:
    """Return the waits for the statistics of all tiles, and for the tiles of a part."""
    return max(1, _steps(a.T, a.BLOCK_T)) + _pipelined(a.TILES, a)


def _value(a: Any) -> int:
    """Return the waits for the parts of m with the rows of W_v, and for a bias."""
    slices = ceil(a.P * _steps(a.D, a.BLOCK_D) / max(1, a.STAGES - 1))
    return slices + int(a.v_bias_ptr is not None)


def _merge(a: Any) -> int:
    """Return the waits: row starts; positions and tokens of full rounds; those of other rounds."""
    row_sizes = a.row_sizes or [ceil(a.N / a.R)] * min(a.R, a.BLOCK_R)
    full, rest = sum(n // a.BLOCK_R for n in row_sizes), max(n % a.BLOCK_R for n in row_sizes)
    return 1 + 2 * full + (1 + rest if rest else 0)


def _lse(a: Any) -> int:
    """Return the waits for the mask of queries, and for the mask and keys of every tile."""
    tiles = _steps(a.N, a.BLOCK_N)
    return int(a.HAS_QUERY_MASK) + (tiles if a.HAS_MASK else _pipelined(tiles, a))


def _mean(a: Any) -> int:
    """Return the waits for the mask of queries, and for the sums of the heads."""
    return (_steps(a.M, a.BLOCK_M) if a.HAS_QUERY_MASK else 0) + _steps(a.G, a.BLOCK_G)


def _diverse(a: Any) -> int:
    """Return the waits for the diagonal, the parts of the first token, and a row per token."""
    return (0 if a.HAS_FIRST else _steps(a.T, a.BLOCK_T)) + a.K


def _dpp(a: Any) -> int:
    """Return the waits for the diagonal, and of each step for the row with the known columns."""
    return 1 + sum(max(1, _steps(t, a.BLOCK_T)) for t in range(a.K))


WAITS: dict[str, Callable[[Any], int]] = {
    "_query_kernel": _query,
    "scores_kernel": lambda a: _pipelined(_steps(a.D, a.BLOCK_K), a),
    "_row_kernel": lambda a: _steps(a.H, a.BLOCK_H),
    "_score_select_kernel": lambda a: _steps(a.H, a.BLOCK_H),
    "_keys_kernel": lambda a: _steps(a.GROUP, 2),  # prefetches the next query
    "_lse_kernel": _lse,
    "_sums_kernel": lambda a: int(a.HAS_MASK) + a.GROUP * _steps(a.M, a.BLOCK_M),
    "_mean_kernel": _mean,
    "_weights_kernel": lambda a: _pipelined(_steps(a.D, a.BLOCK_K), a),
    "_weigh_kernel": _weigh,
    "_value_kernel": _value,
    "_select_kernel": lambda a: 1,
    "_stream_kernel": lambda a: (6 if a.MERGE and a.NORMALIZE else 5) * _steps(a.N, a.BLOCK_N),
    "_move_kernel": lambda a: (
        (1 if a.MERGE else 2) * _steps(a.N, a.BLOCK_N)
    ),  # without merging, slots come first
    "_reduce_fwd_kernel": lambda a: 2 if a.P or not a.MERGE else 1,  # prefix tokens come last
    "_reduce_bwd_kernel": lambda a: 2,  # slots, rows
    "_match_kernel": lambda a: (
        _steps(a.N // 2, a.BLOCK_B) * _pipelined(_steps(a.C, a.BLOCK_C), a) + int(a.HAS_PENALTY)
    ),
    "_slots_kernel": lambda a: 1,
    "_slots_of_kernel": lambda a: a.BITS + 1,
    "_nearest_kernel": lambda a: 1 + _steps(a.K, a.BLOCK_K) * _pipelined(_steps(a.C, a.BLOCK_C), a),
    "_cosines_kernel": lambda a: _pipelined(_steps(a.D, a.BLOCK_C), a) + int(a.HAS_MASK),
    "_diverse_kernel": _diverse,
    "_dpp_kernel": _dpp,
    "_order_kernel": lambda a: 1 + _steps(a.N, a.BLOCK_M),  # rows of its tokens, then of all
    "_merge_fwd_kernel": _merge,
    "_merge_bwd_kernel": lambda a: 2,  # slots, rows
}
