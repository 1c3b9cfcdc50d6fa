"""Time forms of one op side by side with a copy of as many bytes as the op must move.

ratio    = our time divided by that of another form, median over the rounds
possible = time of the copy divided by that of a form; the analytic model counts the bytes
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.cases import DEVICE, ON_GPU, copies
from benchmarks.kernel_analysis.least_work import Work
from benchmarks.parity import OURS, Form, Tensors, with_gradient
from elip_kernels._operator import OPERATORS
from elip_models.profiling.measure import (
    Step,
    memory_of,
    milliseconds,
    ratios_to,
    time_side_by_side,
)


def compare(
    forms: dict[str, Form],
    inputs: Tensors,
    work: Work,
    *,
    direction: str,
    rounds: int,
    summary: Callable[[list[float]], Any] = median,
) -> tuple[dict[str, Any], Step]:
    """Time forms side by side.

    Args:
        forms: Forms by name; ours is `OURS`.
        inputs: Inputs of the forms; for backward and training the gradient of the output is last.
        work: Bytes and operations in this direction.
        direction: "forward", "backward", or "training" for both.
        rounds: Number of interleaved rounds.
        summary: Of the ratios of all rounds; the median by default.

    Returns:
        The facts for the JSON, and our step.
    """
    sets = copies(inputs, inputs[-1:] if direction == "backward" else inputs)
    prepared = {name: partial(_prepare, form, direction, sets) for name, form in forms.items()}
    prepared["copy"] = partial(copied, work.bytes, len(sets))
    steps = {name: as_step(make) for name, make in prepared.items()}
    times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
    times = {name: [t / len(sets) for t in values] for name, values in times.items()}
    facts = {
        "direction": direction,
        "kernels": runs_kernels(forms[OURS], inputs),
        "rounds": rounds,
        "milliseconds": milliseconds(times),
        "ratios": {name: ratios_to(name, times, summary)[OURS] for name in forms if name != OURS},
        "possible": {name: 1 / ratio for name, ratio in ratios_to("copy", times).items()},
        "copy_gb_per_second": work.bytes / median(times["copy"]) / 1e9,
        "bytes": work.bytes,
        "operations": work.operations,
        "memory": {name: _memory(form, direction, inputs) for name, form in forms.items()},
    }
    return facts, steps[OURS]


def _prepare(form: Form, direction: str, sets: list[Tensors]) -> Step:
    """Return a step that calls `form` on each set of inputs and keeps all outputs until the end."""
    if direction == "backward":
        graphs = [(form(*inputs)[0], inputs[0], grad) for *inputs, grad in sets]

        def backward() -> list[Tensors]:
            return [torch.autograd.grad(*each, retain_graph=True) for each in graphs]

        return backward

    def call() -> list[Tensors]:
        return [with_gradient(form, *inputs) for inputs in sets]

    return call


def copied(nbytes: int, count: int) -> Step:
    """Return a step of `count` copies between allocated buffers, `nbytes` read and written each."""
    halves = [torch.zeros(2, nbytes // 2, dtype=torch.uint8, device=DEVICE) for _ in range(count)]

    def copy() -> None:
        for source, target in halves:
            target.copy_(source)

    return copy


def as_step(prepare: Callable[[], Step]) -> Step:
    """Return the step of `prepare`, on a GPU as a CUDA graph."""
    return capture_graph(prepare) if ON_GPU else prepare()


def runs_kernels(ours: Form, inputs: Tensors) -> bool:
    """Return whether a call launches our kernels, and no PyTorch implementation instead."""
    operators = OPERATORS.values()
    with ExitStack() as stack:
        launchers, references = (
            [stack.enter_context(patch.object(o, form, wraps=getattr(o, form))) for o in operators]
            for form in ("launcher", "reference")
        )
        with_gradient(ours, *inputs)
    return any(each.called for each in launchers) and not any(each.called for each in references)


def _memory(form: Form, direction: str, inputs: Tensors) -> int:
    """Return the bytes that a form allocates beyond its inputs."""
    step = _prepare(form, direction, [inputs])
    return memory_of(step, DEVICE, forward=partial(with_gradient, form, *inputs))


def capture_graph(prepare: Callable[[], Step]) -> Step:
    """Record the step that `prepare` returns as a CUDA graph, which launches without Python.

    `prepare` runs on the stream of the capture, so that a step may be the backward pass of a
    forward pass in `prepare`. The graph has only addresses: the result keeps the step's tensors.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = prepare()
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Step) -> None:
    graph.replay()
