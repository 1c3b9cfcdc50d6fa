"""Every kernel at the real cases, compiled ahead of time: one row per kernel, tokens, dtype and
architecture. fp16 compiles as bf16 does.

Of three machines a row says how many programs a batch starts, and in how many waves they run, as
many at once as the occupancy lets: 12/1 is twelve programs in one wave. A second table says how
often a program waits for memory and, in microseconds, what a launch takes by its bytes alone and by
the model of `latency.py`: 0.1/4.3 is one that latency and launching bound. Nothing is timed.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks.kernel_analysis.compile import (
    Arch,
    RecordedLaunch,
    compile_launch,
    recorded_launches,
)
from benchmarks.kernel_analysis.latency import MACHINES, LaunchSize, bound, size_of, waves
from elip_kernels.testing.calls import BATCHES, CALLS, REAL_CASES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, WIDTH = 12, 768
KEY = ("kernel", "N", "dtype", "arch")
COLUMNS = (*KEY, "warps", "stages", "registers", "stack", "spills", "shared")
COLUMNS += ("occupancy", "limit", "wide_share", "instructions")
BATCH_SIZES = (1, 8, 32, 64, 256)  # images in a batch, of which programs and waves are said
COLUMNS += tuple(f"B={B}" for B in BATCH_SIZES)
TIMES = (*KEY, "waits", *(f"us, B={B}" for B in BATCH_SIZES))


class Job(NamedTuple):
    """The `index`-th launch of a call."""

    call: str
    B: int
    N: int
    K: int
    dtype: str
    arch: Arch
    index: int


def report(archs: Sequence[Arch], calls: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each kernel that `calls` launch; what a compiler says no to is a row as well."""
    jobs: dict[tuple, Job] = {}
    for call, (N, K), dtype, arch, B in product(calls, REAL_CASES, DTYPES, archs, BATCHES):
        for index, launch in enumerate(recorded_call(call, B, N, K, dtype, arch)):
            jobs.setdefault((launch.name, N, dtype, arch), Job(call, B, N, K, dtype, arch, index))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        facts = list(threads.map(_compile_in_subprocess, jobs.values()))
    rows = [dict(zip(KEY, key, strict=True)) | f for key, f in zip(jobs, facts, strict=True)]
    of_batches = sizes(calls) if MACHINES.keys() & set(archs) else {}
    for row in rows:
        if row["arch"] in MACHINES and row.get("occupancy"):
            row |= batch_columns(row, of_batches[row["kernel"], row["N"], row["dtype"]])
    return rows


def sizes(
    calls: Sequence[str], batches: Sequence[int] = BATCH_SIZES
) -> dict[tuple[str, int, str], dict[int, LaunchSize]]:
    """By kernel, tokens and dtype: what a launch for a batch of each size is."""
    found: dict[tuple[str, int, str], dict[int, LaunchSize]] = {}
    for call, (N, K), dtype, B in product(calls, REAL_CASES, DTYPES, batches):
        for launch in recorded_call(call, B, N, K, dtype, 90):
            of_kernel = found.setdefault((launch.name, N, dtype), {})
            of_kernel.setdefault(B, size_of(launch))  # of the first call, as the rows are
    return found


def batch_columns(row: dict[str, Any], of_batches: dict[int, LaunchSize]) -> dict[str, Any]:
    """What a row says of each batch on its machine."""
    machine, at_once = MACHINES[row["arch"]], row["occupancy"] // row["warps"]
    facts: dict[str, Any] = {"waits": max(size.waits for size in of_batches.values())}
    for B, size in of_batches.items():
        facts[f"B={B}"] = f"{size.programs}/{waves(size, at_once, machine)}"
        times = (f"{1e6 * seconds:.1f}" for seconds in bound(size, at_once, machine))
        facts[f"us, B={B}"] = "/".join(times)
    return facts


def recorded_call(
    call: str, B: int, N: int, K: int, dtype: str, arch: Arch
) -> list[RecordedLaunch]:
    """What a call of `CALLS` launches for a ViT-B."""
    with recorded_launches(arch) as launches:
        CALLS[call](B, N, WIDTH, K, HEADS, DTYPES[dtype])
    return launches


_worker = threading.local()


def _compile_in_subprocess(job: Job) -> dict[str, Any]:
    """`_compile` in this thread's own process: a compiler that crashes takes only that along."""
    if getattr(_worker, "process", None) is None:
        _worker.process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    try:
        return _worker.process.submit(_compile, job).result()
    except BrokenProcessPool:
        _worker.process = None
        return {"error": "the compiler crashed"}


def _compile(job: Job) -> dict[str, Any]:
    """The figures of one kernel, or the reason why there are none."""
    launch = recorded_call(*job[:-1])[job.index]
    try:
        code = compile_launch(launch, job.arch)
    except Exception as error:  # compilers raise many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:120]}
    warps, limit = code.occupancy
    facts = {"warps": code.num_warps, "stages": code.num_stages, "registers": code.registers}
    facts |= {"stack": code.stack + code.local, "spills": code.spills, "shared": code.shared}
    facts |= {"occupancy": warps, "limit": limit, "wide_share": round(code.wide_share(), 3)}
    facts["instructions"] = code.instructions.total()
    return facts if warps else facts | {"error": f"does not fit: {limit}"}


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """What the code of each kernel says, and what time is predicted where a machine is known."""
    timed = [row for row in rows if "waits" in row]
    return "\n\n".join([table(rows), *([table(timed, TIMES)] if timed else [])])


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Aligned text; what is wrong with a row stands behind it."""
    cells = [tuple(columns)] + [tuple(str(row.get(name, "-")) for name in columns) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    errors = ["", *(row.get("error", "") for row in rows)]
    lines = []
    for (first, *rest), error in zip(cells, errors, strict=True):
        aligned = map(str.rjust, rest, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *aligned, error]).rstrip())
    return "\n".join(lines)
