"""Tune the numbers of elip_kernels/launch.py on the device of this machine.

    python -m benchmarks.tune --out tune.json [--seconds 480] [--rounds 11] [OP | OP.TABLE ...]

A candidate is the result of a function of launch.py with some fields changed. It is timed only if
the results of the op equal those with the original numbers. Only those kernels of the op are timed
whose launches the numbers change. The candidate is timed next to the original, in interleaved
rounds of CUDA-graph replays. The replays cycle through inputs and outputs of twice the L2 size, so
that no call finds its data in the cache. Results that the file has already are not measured again.
"""

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, ON_GPU, copies
from benchmarks.comparison import as_step
from benchmarks.gpu_run import TO_BE_CONTINUED
from benchmarks.machine import machine
from benchmarks.sweeps import SHAPES, SWEEPS, Number, Shape, Sweep, arguments
from elip_kernels import launch
from elip_kernels._operator import OPERATORS, FallbackWarning
from elip_kernels._triton import HAS_TRITON, triton
from elip_kernels.ops.absorbed_query import QueryArguments
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import milliseconds, no_gain, ratios_to, time_side_by_side
from elip_models.saving.files import write_file

REFUSALS = (triton.errors.TritonError,) if HAS_TRITON else ()
FATAL = re.compile("CUDA error|HIP error|illegal (memory|instruction)|misaligned|launch failure")


def changed(answer: Any, changes: dict[str | int, Number]) -> Any:
    """Return a result of launch.py (dict or tuple) with some numbers replaced."""
    is_dict = isinstance(answer, dict)
    fields: dict[Any, Any] = answer if is_dict else dict(enumerate(answer))
    unknown = changes.keys() - fields.keys()
    if unknown:
        raise ValueError(f"axes: expected fields among {list(fields)}, got {sorted(unknown)}")
    fields = fields | {
        name: int(fields[name] * number) if isinstance(number, float) else number
        for name, number in changes.items()
    }
    return fields if is_dict else tuple(fields.values())


@contextmanager
def changed_table(table: str, changes: dict[str | int, Number]) -> Iterator[None]:
    """Apply `changes` to the results of `launch.<table>` inside the block."""
    own = getattr(launch, table)
    with patch.object(launch, table, lambda *args: changed(own(*args), changes)):
        yield


@contextmanager
def recorded_launches(*, run: bool = True) -> Iterator[list[tuple[Any, ...]]]:
    """Record kernel, arguments and options of each launch inside the block, and maybe run it."""
    launches, own = [], launch.run

    def record(kernel: Any, *args: Any, **options: Any) -> None:
        launches.append((kernel, args, options))
        if run:
            own(kernel, *args, **options)

    with patch.object(launch, "run", record):
        yield launches


def tuned_kernels(sweep: Sweep, args: tuple[Any, ...]) -> set[str]:
    """Return the names of the op's kernels whose launches the numbers of a sweep change."""
    found = []
    for changes in ({}, *sweep.candidates()):
        with (
            changed_table(sweep.table, changes),
            patch.object(Tensor, "new_empty", Tensor.new_zeros),  # positions stay within bounds
            recorded_launches(run=False) as launches,
        ):
            results(sweep.op, args)
        found.append([(kernel.fn.__name__, options) for kernel, _, options in launches])
    return {same[0][0] for same in zip(*found, strict=True) if any(it != same[0] for it in same)}


def results(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of an op as a tuple; on a GPU those of its kernels, without a fallback."""
    operator = OPERATORS[op]
    with patch.object(operator, "warned_reasons", set()), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        outputs = (operator.overload if ON_GPU else operator.reference)(*args)
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
        selected = torch.ops.elip.reduce(tokens, got[-1][:, 1:], None, others[0], 1, others[1])
        right = (*selected, right[-1])
    for ours, theirs in zip(got, right, strict=True):
        atol = rtol = 0.0
        if ours.is_floating_point():
            atol, rtol = 1e-5, max(1e-5, 2 * torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def prepared(op: str, sets: Sequence[tuple[Any, ...]], kernels: set[str]) -> Callable[[], object]:
    """Return a step that launches these kernels of the op for each set, with the same tensors."""
    with recorded_launches() as launches:
        for args in sets:
            results(op, args)
    tuned = [each for each in launches if each[0].fn.__name__ in kernels]

    def repeat() -> None:
        with launch.device_guard(sets[0][0]):
            for kernel, args, options in tuned:
                launch.run(kernel, *args, **options)

    return as_step(lambda: repeat)


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
    args = arguments(sweep.op, shape)
    kernels = tuned_kernels(sweep, args)
    result = {"name": f"{sweep} {shape}", "kernels": sorted(kernels), "candidates": []}
    if ON_GPU and not kernels:
        return result
    sets, right = rotated(args), results(sweep.op, args)
    steps = {"table": prepared(sweep.op, sets, kernels)}
    for changes in sweep.candidates():
        entry: dict[str, Any] = {"changes": {str(name): n for name, n in changes.items()}}
        result["candidates"].append(entry)
        try:
            with changed_table(sweep.table, changes):
                check(sweep.op, args, results(sweep.op, args), right)
                steps["candidate"] = prepared(sweep.op, sets, kernels)
        except AssertionError as error:
            entry["wrong"] = str(error)
        except (
            RuntimeError,
            FallbackWarning,
            *REFUSALS,
        ) as error:
            if FATAL.search(str(error)):
                raise RuntimeError(f"{sweep} {shape}: {changes}") from error
            entry["left_out"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
            per_call = {name: 1e3 * each / len(sets) for name, each in milliseconds(times).items()}
            entry |= {f"{name}_us": each for name, each in per_call.items()}
            entry["of_table"] = ratios_to("table", times)["candidate"]
    return result


def summary(result: dict[str, Any]) -> str:
    """Return a line with the best candidate, its time relative to the table, and failures."""
    name, tried = result["name"], result["candidates"]
    entries = [entry for entry in tried if "of_table" in entry]
    wrong, left_out = (sum(what in entry for entry in tried) for what in ("wrong", "left_out"))
    notes = (f"; {left_out} left out" if left_out else "") + (f"; {wrong} WRONG" if wrong else "")
    if not entries:
        return f"{name}: no candidate ran{notes}"
    best = min(entries, key=lambda entry: entry["of_table"])
    verdict = "no gain" if no_gain(best["of_table"]) else f"{best['changes']}"
    return (
        f"{name}: {' and '.join(result['kernels'])}: table {best['table_us']:.1f} us, "
        f"best {best['candidate_us']:.1f} us ({best['of_table']:.3f}): {verdict}{notes}"
    )


def tune(
    sweeps: Sequence[Sweep], shapes: Sequence[Shape], out: Path, *, rounds: int, seconds: float
) -> int:
    """Run every sweep on every shape within `seconds`, and add each result to the file at once.

    Returns:
        0 if all results are right, 1 if some are wrong, or `TO_BE_CONTINUED` if some are left.

    Raises:
        ValueError: the file has results of another device, commit or number of rounds.
    """
    end, left = time.monotonic() + seconds, []
    document = machine() | {"commit": commit(), "rounds": rounds, "results": []}
    if out.exists():
        expected, document = document, json.loads(out.read_text())
        if document | {"results": []} != expected:
            raise ValueError(f"out: expected no results of another run, got {out}; move the file")
    done = {result["name"]: result for result in document["results"]}
    for shape, sweep in product(shapes, sweeps):
        if f"{sweep} {shape}" in done:
            continue
        if time.monotonic() > end:
            left.append(f"{sweep} {shape}")
            continue
        torch.manual_seed(0)
        document["results"].append(run(sweep, shape, rounds))
        write_line(summary(document["results"][-1]))
        write_file(out, (json.dumps(document, indent=1) + "\n").encode())
    for name in left:
        write_line(f"not run, out of time: {name}")
    asked = {f"{sweep} {shape}" for sweep in sweeps for shape in shapes}
    tried = [e for r in document["results"] if r["name"] in asked for e in r["candidates"]]
    return TO_BE_CONTINUED if left else int(any("wrong" in entry for entry in tried))


def write_line(line: str) -> None:
    """Write a line to stdout and flush it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the sweeps and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="sweep these ops, or OP.TABLE, only")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=480)
    options = parser.parse_args(argv)
    known = {name for sweep in SWEEPS for name in (sweep.op, str(sweep))}
    if not set(options.ops) <= known:
        parser.error(f"OP: expected some of {sorted(known)}, got {options.ops}")
    if not ON_GPU:
        parser.error("expected a CUDA or ROCm device, got none: a CPU does not read the table")
    wanted = set(options.ops) or known
    sweeps = [sweep for sweep in SWEEPS if wanted & {sweep.op, str(sweep)}]
    return tune(sweeps, SHAPES, options.out, rounds=options.rounds, seconds=options.seconds)


if __name__ == "__main__":
    sys.exit(main())
