"""Compile every kernel for real shapes: one row per kernel, tokens, dtype and architecture.

fp16 compiles as bf16 does. `wide_share` is the share of the bytes that is moved by accesses of 128
bits or more. `moved` is the bytes that the programs access over the distinct bytes of the launch,
which are the least that memory must move: counted in Triton's interpreter, for one image of 257
tokens in bf16. Nothing is timed.
"""

import json
import os
import subprocess
import sys
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
from elip_kernels.testing import BATCHES, REAL_CASES, call

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, WIDTH = 12, 768
KEY = ("kernel", "N", "dtype", "arch")
COLUMNS = (*KEY, "warps", "stages", "registers", "stack", "spills", "shared")
COLUMNS += ("occupancy", "limit", "wide_share", "instructions", "moved")
COUNTED = (257, "bf16")  # tokens and dtype of `moved`


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
    moved = moved_over_distinct(ops)
    for row in rows:
        if (row["N"], row["dtype"]) == COUNTED:
            row["moved"] = moved[row["kernel"]]
    return rows


def moved_over_distinct(ops: Sequence[str]) -> dict[str, float]:
    """Return `moved` by kernel; the interpreter needs a process of its own."""
    command = (sys.executable, "-m", "benchmarks.kernel_analysis.traffic", *ops)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    counted = subprocess.run(command, env=environment, capture_output=True, check=True)
    return json.loads(counted.stdout)


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
