"""Tune the numbers of elip_kernels/launch.py on the device of this machine.

    python -m benchmarks.tune --out tune.json [--seconds 480] [--rounds 11] [OP ...]

A candidate is the result of a function of launch.py with some fields changed. It is timed only if
its results equal those of the original numbers. It is timed next to the original and to a copy, in
interleaved rounds of CUDA-graph replays. The replays cycle through inputs and outputs of twice the
L2 size, so that no call finds its data in the cache. Rates count the bytes that the op must move.
The candidates of a shape are compiled in parallel processes before they are timed.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, DTYPE_NAMES, ON_GPU, copies
from benchmarks.comparison import as_step, copied
from benchmarks.machine import machine
from benchmarks.sweeps import SHAPES, SWEEPS, Number, Shape, Sweep, arguments, least_bytes
from elip_kernels import launch
from elip_kernels._triton import HAS_TRITON, triton
from elip_kernels.ops.absorbed_query import QueryArguments
from elip_models.models.io.files import write_file
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import milliseconds, no_gain, ratios_to, time_side_by_side

REFUSALS = (triton.errors.TritonError,) if HAS_TRITON else ()
FATAL = re.compile("CUDA error|HIP error|illegal (memory|instruction)|misaligned|launch failure")


def changed(answer: Any, changes: dict[str | int, Number]) -> Any:
    """Return a result of launch.py (NamedTuple, dict or tuple) with some numbers replaced."""
    if isinstance(answer, dict):
        fields: dict[Any, Any] = answer
    else:
        fields = dict(zip(getattr(answer, "_fields", range(len(answer))), answer, strict=True))
    unknown = changes.keys() - fields.keys()
    if unknown:
        raise ValueError(f"axes: expected fields among {list(fields)}, got {sorted(unknown)}")
    fields = fields | {
        name: int(fields[name] * number) if isinstance(number, float) else number
        for name, number in changes.items()
    }
    if isinstance(answer, dict):
        return fields
    values = fields.values()
    return type(answer)(*values) if hasattr(answer, "_fields") else tuple(values)


@contextmanager
def changed_table(table: str, changes: dict[str | int, Number]) -> Iterator[list[Any]]:
    """Apply `changes` to the results of `launch.<table>` inside the block; yield these results."""
    own, answers = getattr(launch, table), []

    def answer(*args: Any, **kwargs: Any) -> Any:
        answers.append(changed(own(*args, **kwargs), changes))
        return answers[-1]

    with patch.object(launch, table, answer):
        yield answers


def results(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of an op as a tuple."""
    outputs = getattr(torch.ops.elip, op)(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(
    op: str, args: tuple[Any, ...], got: tuple[Tensor, ...], right: tuple[Tensor, ...]
) -> None:
    """Assert that integers are equal and floats equal up to the order of a sum.

    If scores tie, the selection depends on the last bit of the row. For `score_reduce`, the row is
    compared with that of the table, and the selection with that of `reduce` on the same row.
    """
    if op == "score_reduce":
        tokens, *others = args[0], *args[1 + len(QueryArguments._fields) :]
        given = torch.ops.elip.reduce(tokens, got[-1][:, 1:], None, others[0], 1, *others[1:3])
        right = (*given, right[-1])
    for ours, theirs in zip(got, right, strict=True):
        atol = rtol = 0.0
        if ours.is_floating_point():
            atol, rtol = 1e-5, max(1e-5, 2 * torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def prepared(op: str, sets: Sequence[tuple[Any, ...]]) -> Callable[[], object]:
    """Return a step that calls the op once for each set and keeps all outputs until the end."""

    def calls() -> list[Any]:
        return [results(op, args) for args in sets]

    return as_step(lambda: calls)


def rotated(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return sets of arguments with copies of the tensors."""
    is_tensor = [isinstance(value, Tensor) for value in args]
    read = tuple(a for a, is_one in zip(args, is_tensor, strict=True) if is_one)
    sets = copies(read, read)
    filled = []
    for tensors in sets:
        left = iter(tensors)
        filled.append(
            tuple(next(left) if one else a for a, one in zip(args, is_tensor, strict=True))
        )
    return filled


def run(sweep: Sweep, shape: Shape, rounds: int) -> dict[str, Any]:
    """Try every candidate of a sweep on one shape; none if the op does not use this table."""
    args, nbytes = arguments(sweep.op, shape), least_bytes(sweep.op, shape)
    dtype = DTYPE_NAMES[shape.dtype]
    result = {"op": sweep.op, "table": sweep.table, **asdict(shape), "dtype": dtype}
    result |= {"bytes": nbytes, "candidates": []}
    with changed_table(sweep.table, {}) as answers:
        right = results(sweep.op, args)
    if ON_GPU and not answers:
        return result
    sets = rotated(args)
    steps = {"table": prepared(sweep.op, sets), "copy": as_step(partial(copied, nbytes, len(sets)))}
    for changes in sweep.candidates():
        entry: dict[str, Any] = {"changes": {str(name): n for name, n in changes.items()}}
        result["candidates"].append(entry)
        try:
            with changed_table(sweep.table, changes):
                check(sweep.op, args, results(sweep.op, args), right)
                steps["candidate"] = prepared(sweep.op, sets)
        except AssertionError as error:
            entry["wrong"] = str(error)
        except (RuntimeError, *REFUSALS) as error:  # does not compile, or does not fit
            if FATAL.search(str(error)):
                raise RuntimeError(f"{sweep.op} ({sweep.table}) {shape}: {changes}") from error
            entry["left_out"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
            entry |= timed(times, nbytes, len(sets))
    return result


def timed(times: dict[str, list[float]], nbytes: int, calls: int) -> dict[str, float]:
    """Return the candidate's time and rate, relative to the table and to a copy."""
    figures = {f"{name}_us": 1e3 * each / calls for name, each in milliseconds(times).items()}
    figures |= {f"of_{name}": ratios_to(name, times)["candidate"] for name in ("table", "copy")}
    return figures | {"gb_per_second": nbytes / figures["candidate_us"] / 1e3}


def summary(result: dict[str, Any]) -> str:
    """Return a line with the best candidate, its time relative to the table, and failures."""
    name = f"{result['op']} ({result['table']}) B{result['B']}-N{result['N']}-{result['dtype']}"
    entries = [entry for entry in result["candidates"] if "of_table" in entry]
    wrong = sum("wrong" in entry for entry in result["candidates"])
    notes = f"; {wrong} WRONG" if wrong else ""
    if not entries:
        return f"{name}: no candidate ran{notes}"
    best = min(entries, key=lambda entry: entry["of_table"])
    verdict = "no gain" if no_gain(best["of_table"]) else f"{best['changes']}"
    return (
        f"{name}: table {best['table_us']:.1f} us, best {best['candidate_us']:.1f} us "
        f"({best['of_table']:.3f}), {best['gb_per_second']:.0f} GB/s, "
        f"{1 / best['of_copy']:.2f} of a copy: {verdict}{notes}"
    )


def precompile(pool: Executor, sweeps: Sequence[Sweep], shape: Shape, *, seconds: float) -> None:
    """Run every candidate once in other processes, for at most `seconds`.

    The compiled kernels stay in Triton's disk cache. Errors are ignored here, because `run` meets
    them again.
    """
    with suppress(BrokenExecutor):
        tries = [
            pool.submit(attempt, sweep, shape, changes)
            for sweep in sweeps
            for changes in sweep.candidates()
        ]
        for late in wait(tries, timeout=max(0.0, seconds)).not_done:
            late.cancel()


def attempt(sweep: Sweep, shape: Shape, changes: dict[str | int, Number]) -> None:
    """Call the op once with a candidate's numbers."""
    args = arguments(sweep.op, shape)
    with changed_table(sweep.table, changes):
        results(sweep.op, args)


def processes() -> AbstractContextManager[Executor | None]:
    """Return a pool with one process per core but one, or None without a GPU."""
    if not ON_GPU:
        return nullcontext()
    count = max(1, (os.cpu_count() or 2) - 1)
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def tune(
    sweeps: Sequence[Sweep], shapes: Sequence[Shape], out: Path, *, rounds: int, seconds: float
) -> bool:
    """Run every sweep on every shape within `seconds`; return whether all results were right.

    The JSON file is complete after each sweep.
    """
    end, done, left = time.monotonic() + seconds, [], []
    document = machine() | {"commit": commit(), "rounds": rounds}
    document |= {"results": done, "not_run": left}
    with processes() as pool:
        for shape, sweep in product(shapes, sweeps):
            if pool is not None and sweep is sweeps[0]:
                precompile(pool, sweeps, shape, seconds=end - time.monotonic())
            if time.monotonic() > end:
                left.append(f"{sweep.op} ({sweep.table}) {shape}")
            else:
                torch.manual_seed(0)
                done.append(run(sweep, shape, rounds))
                write_line(summary(done[-1]))
            write_file(out, (json.dumps(document, indent=1) + "\n").encode())
    for name in left:
        write_line(f"not run, out of time: {name}")
    return not any("wrong" in entry for result in done for entry in result["candidates"])


def write_line(line: str) -> None:
    """Write a line to stdout and flush it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the sweeps and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="sweep these ops only")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=480)
    options = parser.parse_args(argv)
    known = {sweep.op for sweep in SWEEPS}
    if not set(options.ops) <= known:
        parser.error(f"OP: expected some of {sorted(known)}, got {options.ops}")
    if not ON_GPU:
        parser.error("expected a CUDA or ROCm device, got none: a CPU does not read the table")
    sweeps = [sweep for sweep in SWEEPS if not options.ops or sweep.op in options.ops]
    right = tune(sweeps, SHAPES, options.out, rounds=options.rounds, seconds=options.seconds)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
