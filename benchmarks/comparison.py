"""Forms of one op timed side by side with a copy of as many bytes as the op must move.

ratio    = our time over that of another form, median over the rounds
possible = time of the copy over that of a form; the bytes are those of the analytic model
"""

from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.cases import DEVICE, ON_GPU, copies
from benchmarks.parity import OURS, Form, Tensors, with_gradient
from elip_kernels._operator import OPERATORS
from elip_kernels.testing.model import Work
from elip_models.profiling.measure import (
    Step,
    graphed,
    peak_bytes,
    ratios_to,
    saved_bytes,
    time_side_by_side,
)


def compare(
    forms: dict[str, Form], inputs: Tensors, work: Work, *, direction: str, rounds: int
) -> tuple[dict[str, Any], Step]:
    """Time forms side by side.

    Args:
        forms: by name; ours is `OURS`.
        inputs: of the forms; beyond the forward direction the gradient of the output comes last.
        work: of this direction.
        direction: forward, backward or training, which is both.
        rounds: interleaved.

    Returns:
        What goes into the JSON, and our step.
    """
    sets = copies(inputs, inputs[-1:] if direction == "backward" else inputs)
    prepared = {name: partial(_prepare, form, direction, sets) for name, form in forms.items()}
    prepared["copy"] = partial(_prepare_copy, work.bytes // 2, len(sets))
    steps = {name: graphed(make) if ON_GPU else make() for name, make in prepared.items()}
    times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
    times = {name: [t / len(sets) for t in values] for name, values in times.items()}
    facts = {
        "direction": direction,
        "kernels": runs_kernels(forms[OURS], inputs),
        "rounds": rounds,
        "milliseconds": {name: 1e3 * median(values) for name, values in times.items()},
        "ratios": {name: ratios_to(name, times)[OURS] for name in forms if name != OURS},
        "possible": {name: 1 / ratio for name, ratio in ratios_to("copy", times).items()},
        "copy_gb_per_second": work.bytes / median(times["copy"]) / 1e9,
        "bytes": work.bytes,
        "operations": work.operations,
        "memory": {name: _memory(form, direction, inputs) for name, form in forms.items()},
    }
    return facts, steps[OURS]


def _prepare(form: Form, direction: str, sets: list[Tensors]) -> Step:
    """One call of `form` for each set of inputs; every output stands until the last is done."""
    if direction == "backward":
        graphs = [(form(*inputs)[0], inputs[0], grad) for *inputs, grad in sets]

        def backward() -> list[Tensors]:
            return [torch.autograd.grad(*each, retain_graph=True) for each in graphs]

        return backward

    def call() -> list[Tensors]:
        return [with_gradient(form, *inputs) for inputs in sets]

    return call


def _prepare_copy(nbytes: int, count: int) -> Step:
    """A copy between buffers that exist: nothing is allocated, so no page is new."""
    sources = [torch.zeros(nbytes // 4, device=DEVICE) for _ in range(count)]
    targets = [torch.zeros_like(source) for source in sources]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    return copy


def runs_kernels(ours: Form, inputs: Tensors) -> bool:
    """Whether a call launches this project's kernels and runs no PyTorch form in place of one."""
    operators = OPERATORS.values()
    with ExitStack() as stack:
        launchers, references = (
            [stack.enter_context(patch.object(o, form, wraps=getattr(o, form))) for o in operators]
            for form in ("launcher", "reference")
        )
        with_gradient(ours, *inputs)
    return any(each.called for each in launchers) and not any(each.called for each in references)


def _memory(form: Form, direction: str, inputs: Tensors) -> int:
    """Bytes beyond the inputs: the peak on a GPU, on a CPU what autograd saves for backward."""
    if ON_GPU:
        return peak_bytes(_prepare(form, direction, [inputs]), DEVICE)
    with saved_bytes() as count:
        with_gradient(form, *inputs)
    return count()
