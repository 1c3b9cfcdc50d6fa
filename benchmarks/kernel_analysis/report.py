"""Compile every kernel for real shapes: one row per kernel, tokens, dtype and architecture.

fp16 compiles as bf16 does. Barriers are those of a block outside of loops, and in each loop that
has any: 22+4+4 has two loops with four per step. The last columns have the number of programs at
several batch sizes. Nothing is timed.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from math import prod
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks.kernel_analysis.compile import (
    Arch,
    RecordedLaunch,
    compile_launch,
    recorded_launches,
)
from elip_kernels.testing import BATCHES, REAL_CASES, call

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, WIDTH = 12, 768
KEY = ("kernel", "N", "dtype", "arch")
COLUMNS = (*KEY, "warps", "stages", "registers", "stack", "spills", "shared")
COLUMNS += ("occupancy", "limit", "wide_share", "instructions", "barriers")
BATCH_SIZES = (1, 8, 32, 64, 256)  # images
COLUMNS += tuple(f"B={B}" for B in BATCH_SIZES)


class Job(NamedTuple):
    """The `index`-th launch of a call of an op."""

    op: str
    B: int
    N: int
    K: int
    dtype: str
    arch: Arch
    index: int


def report(archs: Sequence[Arch], ops: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per kernel that `ops` launch; a compile failure is a row with "error"."""
    jobs: dict[tuple, Job] = {}
    for op, (N, K), dtype, arch, B in product(ops, REAL_CASES, DTYPES, archs, BATCHES):
        for index, launch in enumerate(recorded_call(op, B, N, K, dtype, arch)):
            jobs.setdefault((launch.name, N, dtype, arch), Job(op, B, N, K, dtype, arch, index))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        facts = list(threads.map(_compile_in_subprocess, jobs.values()))
    rows = [dict(zip(KEY, key, strict=True)) | f for key, f in zip(jobs, facts, strict=True)]
    programs = programs_of(ops)
    for row in rows:
        row |= {f"B={B}": n for B, n in programs[row["kernel"], row["N"], row["dtype"]].items()}
    return rows


def programs_of(
    ops: Sequence[str], batches: Sequence[int] = BATCH_SIZES
) -> dict[tuple[str, int, str], dict[int, int]]:
    """Return the number of programs of each batch by kernel, tokens and dtype."""
    by_kernel: dict[tuple[str, int, str], dict[int, int]] = {}
    for op, (N, K), dtype, B in product(ops, REAL_CASES, DTYPES, batches):
        for launch in recorded_call(op, B, N, K, dtype, 90):
            of_kernel = by_kernel.setdefault((launch.name, N, dtype), {})
            of_kernel.setdefault(B, prod(launch.grid))  # of the first op, as in the rows
    return by_kernel


def recorded_call(op: str, B: int, N: int, K: int, dtype: str, arch: Arch) -> list[RecordedLaunch]:
    """Return the launches of an op for a ViT-B, forward and backward."""
    with recorded_launches(arch) as launches:
        call(op, B, N, WIDTH, K, HEADS, DTYPES[dtype])
    return launches


_worker = threading.local()


def _compile_in_subprocess(job: Job) -> dict[str, Any]:
    """Run `_compile` in a process of this thread, which a compiler crash ends alone."""
    if getattr(_worker, "process", None) is None:
        _worker.process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    try:
        return _worker.process.submit(_compile, job).result()
    except BrokenProcessPool:
        _worker.process = None
        return {"error": "the compiler crashed"}


def _compile(job: Job) -> dict[str, Any]:
    """Return the figures of one kernel, or the error message of the compiler."""
    launch = recorded_call(*job[:-1])[job.index]
    try:
        code = compile_launch(launch, job.arch)
    except Exception as error:  # compilers raise many types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:120]}
    warps, limit = code.occupancy
    facts = {"warps": code.num_warps, "stages": code.num_stages, "registers": code.registers}
    facts |= {"stack": code.stack + code.local, "spills": code.spills, "shared": code.shared}
    facts |= {"occupancy": warps, "limit": limit, "wide_share": round(code.wide_share(), 3)}
    facts["instructions"] = code.instructions.total()
    if code.barriers is not None:
        facts["barriers"] = "+".join(map(str, code.barriers))
    return facts if warps else facts | {"error": f"does not fit: {limit}"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return aligned text; an error follows its row."""
    cells = [COLUMNS, *(tuple(str(row.get(name, "-")) for name in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    errors = ["", *(row.get("error", "") for row in rows)]
    lines = []
    for (first, *rest), error in zip(cells, errors, strict=True):
        aligned = map(str.rjust, rest, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *aligned, error]).rstrip())
    return "\n".join(lines)
