"""Sweep the numbers of elip_kernels/launch.py on the device that is here.

    python -m benchmarks.tune --out tune.json [--seconds 480] [--rounds 11] [OP ...]

A candidate is what a function of the table answers, with some fields changed. Its results must be
those of the table before it is timed. It is timed beside the table's own numbers and a copy, in
interleaved rounds: CUDA-graph replays that go through sets of inputs, together twice the L2, and
their outputs, so that a call finds nothing there. Rates are the bytes that the op must move.
Candidates are compiled in processes side by side, before those of a shape are timed.
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
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, DTYPE_NAMES, HEADS, ON_GPU, WIDTH, copies
from benchmarks.comparison import as_step, copied
from benchmarks.machine import machine
from elip_kernels import launch
from elip_kernels._triton import HAS_TRITON, triton
from elip_kernels.absorbed_query import QueryArguments
from elip_kernels.testing import model
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import milliseconds, no_gain, ratios_to, time_side_by_side

CHANNELS = WIDTH // HEADS
REFUSALS = (triton.errors.TritonError,) if HAS_TRITON else ()
FATAL = re.compile("CUDA error|HIP error|illegal (memory|instruction)|misaligned|launch failure")
Number = int | float


@dataclass(frozen=True)
class Sweep:
    """What to try for one op: `axes` of the answers of `launch.<table>`, by field (by position
    where the answer is a plain tuple). An int takes the place of the number, a float scales it."""

    op: str
    table: str
    axes: dict[str | int, tuple[Number, ...]]

    def candidates(self) -> list[dict[str | int, Number]]:
        """Every combination."""
        return [
            dict(zip(self.axes, numbers, strict=True)) for numbers in product(*self.axes.values())
        ]


@dataclass(frozen=True)
class Shape:
    """Images, tokens an image, dtype; ViT-B wide, 65% of the patches kept, a quarter merged."""

    B: int
    N: int
    dtype: torch.dtype

    @property
    def kept(self) -> int:
        return max(1, int(0.65 * (self.N - 1)))

    @property
    def merged(self) -> int:
        return self.N // 4

    def __str__(self) -> str:
        return f"B{self.B}-N{self.N}-{DTYPE_NAMES[self.dtype]}"


TILE = {"block_d": (0.5, 1.0, 2.0), "num_warps": (4, 8, 16)}
ROWS = {"block_n": (0.5, 1.0, 2.0), "block_d": (0.5, 1.0, 2.0), "num_warps": (4, 8)}
QUERY = {"BLOCK_D": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
TILES = {"BLOCK_N": (32, 64, 128), "BLOCK_K": (0.5, 1.0), "num_warps": (4, 8), "num_stages": (2, 3)}
RECEIVED = {"BLOCK_M": (0.5, 1.0, 2.0), "BLOCK_N": (0.5, 1.0, 2.0)}
RECEIVED |= {"num_warps": (4, 8), "num_stages": (2, 3)}
WEIGH = {"BLOCK_D": (0.5, 1.0, 2.0), "num_warps": (4, 8), "num_stages": (2, 3)}
SWEEPS = (
    Sweep("reduce", "reduce_forward", TILE),
    Sweep("reduce_backward", "reduce_backward", ROWS),
    Sweep("score_reduce", "query", QUERY),
    Sweep("score_reduce", "score_tiles", TILES),
    Sweep("score_reduce", "select", {2: (0.5, 1.0, 2.0)}),
    Sweep("score_reduce", "move", TILE),
    Sweep("cls_attend_from_tokens", "weight_tiles", TILES),
    Sweep("cls_attend_from_tokens", "weigh", WEIGH),
    Sweep("cls_attend_from_tokens", "value", QUERY),
    Sweep("attention_received", "received", RECEIVED),
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
    return torch.randn(*shape, device=DEVICE).to(dtype)


def arguments(op: str, shape: Shape) -> tuple[Any, ...]:
    """Make the arguments of `torch.ops.elip.<op>`."""
    B, N, dtype = shape.B, shape.N, shape.dtype
    tokens, K, r = random(B, N, WIDTH, dtype=dtype), shape.kept, shape.merged
    if op in ("reduce", "reduce_backward"):
        selecting = (tokens, random(B, N).softmax(1)[:, 1:], None, K, 1, True, True)
        if op == "reduce":
            return selecting
        out, _, weights, slots = torch.ops.elip.reduce(*selecting)
        return torch.randn_like(out), slots, weights, True
    if op == "cls_attention":
        q, k = random(B, HEADS, CHANNELS, dtype=dtype), random(B, HEADS, N, CHANNELS, dtype=dtype)
        return q, k, None, CHANNELS**-0.5
    if op == "attention_received":
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
    if op == "cls_attend_from_tokens":
        return tokens, *query, matrices[2], bias
    return (tokens, *query, K, True, True, None, None) if op == "score_reduce" else (tokens, *query)


def least_bytes(op: str, shape: Shape) -> int:
    """Count the bytes that the op must move."""
    B, N, dtype, K, r = shape.B, shape.N, shape.dtype, shape.kept, shape.merged
    size = {"has_size": True}
    works = {
        "reduce": lambda: model.reduce(B, N, WIDTH, K, dtype),
        "reduce_backward": lambda: model.reduce_backward(B, N, WIDTH, K, dtype),
        "score_reduce": lambda: model.score_reduce(B, N, WIDTH, K, HEADS, dtype),
        "cls_attention": lambda: model.cls_attention(B, HEADS, N, CHANNELS, dtype),
        "attention_received": lambda: model.attention_received(
            B, HEADS, HEADS, N, N, CHANNELS, dtype
        ),
        "bipartite_match": lambda: model.together(
            model.bipartite_match(B, N, CHANNELS, dtype), model.bipartite_slots(B, N)
        ),
        "bipartite_merge": lambda: model.merge_by(B, N, WIDTH, N - r, dtype, **size),
        "bipartite_merge_backward": lambda: model.bipartite_merge_backward(
            B, N, WIDTH, r, dtype, **size
        ),
        "nearest_match": lambda: model.nearest_match(B, N, CHANNELS, K, dtype),
    }
    if op in works:
        return works[op]().bytes
    return getattr(model, op)(B, N, WIDTH, HEADS, dtype).bytes


def changed(answer: Any, changes: dict[str | int, Number]) -> Any:
    """Replace some numbers in an answer of the table: a NamedTuple, dict or tuple."""
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
def answering(table: str, changes: dict[str | int, Number]) -> Iterator[list[Any]]:
    """Inside, `launch.<table>` answers with `changes`; yields its answers."""
    own, answers = getattr(launch, table), []

    def answer(*args: Any, **kwargs: Any) -> Any:
        answers.append(changed(own(*args, **kwargs), changes))
        return answers[-1]

    with patch.object(launch, table, answer):
        yield answers


def results(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    outputs = getattr(torch.ops.elip, op)(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(
    op: str, args: tuple[Any, ...], got: tuple[Tensor, ...], right: tuple[Tensor, ...]
) -> None:
    """Hold integers to be equal, floats up to the order of a sum.

    What a row selects depends on its last bit where scores tie: the row is held to the table's, the
    selection to that of `reduce` on this row.
    """
    if op == "score_reduce":
        tokens, *others = args[0], *args[1 + len(QueryArguments._fields) :]
        given = torch.ops.elip.reduce(tokens, got[-1][:, 1:], None, others[0], 1, *others[1:3])
        right = (*given, right[-1])
    for ours, theirs in zip(got, right, strict=True):
        rtol = 2 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
        torch.testing.assert_close(
            ours, theirs, atol=1e-5 * bool(rtol), rtol=max(1e-5, rtol) * bool(rtol)
        )


def prepared(op: str, sets: Sequence[tuple[Any, ...]]) -> Callable[[], object]:
    """Prepare one call for each set; every output stands until the last call is done."""

    def calls() -> list[Any]:
        return [results(op, args) for args in sets]

    return as_step(lambda: calls)


def rotated(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Copy the tensors of the arguments -> sets of arguments."""
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
    """Try every candidate of a sweep on one shape; none where the op does not ask this table."""
    args, nbytes = arguments(sweep.op, shape), least_bytes(sweep.op, shape)
    dtype = DTYPE_NAMES[shape.dtype]
    result = {"op": sweep.op, "table": sweep.table, **asdict(shape), "dtype": dtype}
    result |= {"bytes": nbytes, "candidates": []}
    with answering(sweep.table, {}) as answers:
        right = results(sweep.op, args)
    if ON_GPU and not answers:
        return result
    sets = rotated(args)
    steps = {"table": prepared(sweep.op, sets), "copy": as_step(partial(copied, nbytes, len(sets)))}
    for changes in sweep.candidates():
        entry: dict[str, Any] = {"changes": {str(name): n for name, n in changes.items()}}
        result["candidates"].append(entry)
        try:
            with answering(sweep.table, changes):
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
    """Work out the candidate's time and rate, beside those of the table and of a copy."""
    figures = {f"{name}_us": 1e3 * each / calls for name, each in milliseconds(times).items()}
    figures |= {f"of_{name}": ratios_to(name, times)["candidate"] for name in ("table", "copy")}
    return figures | {"gb_per_second": nbytes / figures["candidate_us"] / 1e3}


def said(result: dict[str, Any]) -> str:
    """Write a result in one line: the best candidate against the table, and what was wrong."""
    name = f"{result['op']} ({result['table']}) B{result['B']}-N{result['N']}-{result['dtype']}"
    entries = [entry for entry in result["candidates"] if "of_table" in entry]
    wrong = sum("wrong" in entry for entry in result["candidates"])
    notes = f"; {wrong} WRONG" if wrong else ""
    if not entries:
        return f"{name}: nothing to time{notes}"
    best = min(entries, key=lambda entry: entry["of_table"])
    verdict = "no gain" if no_gain(best["of_table"]) else f"{best['changes']}"
    return (
        f"{name}: table {best['table_us']:.1f} us, best {best['candidate_us']:.1f} us "
        f"({best['of_table']:.3f}), {best['gb_per_second']:.0f} GB/s, "
        f"{1 / best['of_copy']:.2f} of a copy: {verdict}{notes}"
    )


def precompile(pool: Executor, sweeps: Sequence[Sweep], shape: Shape, *, seconds: float) -> None:
    """Run every candidate once in other processes, for at most so long: what Triton compiles there
    lies on disk for `run`, which meets the same errors, so they are dropped here."""
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
    with answering(sweep.table, changes):
        results(sweep.op, args)


def processes() -> AbstractContextManager[Executor | None]:
    """Start a process for each core but one; none without a GPU, where nothing is compiled."""
    if not ON_GPU:
        return nullcontext()
    count = max(1, (os.cpu_count() or 2) - 1)
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def tune(
    sweeps: Sequence[Sweep], shapes: Sequence[Shape], out: Path, *, rounds: int, seconds: float
) -> bool:
    """Every sweep on every shape, as long as there is time, into a JSON file that is whole after
    each -> whether all candidates gave the table's results."""
    end, done, left = time.monotonic() + seconds, [], []
    document = machine() | {"commit": commit(), "rounds": rounds}
    document |= {"results": done, "left_for_want_of_time": left}
    with processes() as pool:
        for shape, sweep in product(shapes, sweeps):
            if pool is not None and sweep is sweeps[0]:
                precompile(pool, sweeps, shape, seconds=end - time.monotonic())
            if time.monotonic() > end:
                left.append(f"{sweep.op} ({sweep.table}) {shape}")
            else:
                torch.manual_seed(0)
                done.append(run(sweep, shape, rounds))
                tell(said(done[-1]))
            out.write_text(json.dumps(document, indent=1) + "\n")
    for name in left:
        tell(f"left out for want of time: {name}")
    return not any("wrong" in entry for result in done for entry in result["candidates"])


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
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
