"""Time of reduce against the official algorithm, an eager form, its compiled form, and a copy."""

import pytest
import torch

import elip_kernels
from benchmarks.cases import described, directions, reduce_cases
from benchmarks.comparison import compare
from benchmarks.kernel_analysis import least_work
from benchmarks.parity import OURS, in_fp64, on_device, parity, with_compiled, with_gradient
from benchmarks.replaced_forms import eager_reduce, official_reduce

FUNCTIONS = {"official": official_reduce, "eager": eager_reduce, OURS: elip_kernels.reduce}
IMAGES = 8  # compared with fp64: the first and last images


def forms_of(keep):
    """Return the forms by name, each (tokens, scores) -> (output,)."""

    def form(function):
        return lambda tokens, scores: (function(tokens, scores, keep),)

    return {name: form(function) for name, function in FUNCTIONS.items()}


def work_of(case, direction):
    shape = (case.B, case.N, case.D, case.K, case.dtype)
    works = {"forward": least_work.reduce(*shape), "backward": least_work.reduce_backward(*shape)}
    return works[direction] if direction in works else least_work.together(*works.values())


@pytest.mark.cases(case=reduce_cases, direction=directions)
def test_reduce(record, rounds, case, direction):
    inputs = list(case.inputs())
    if direction != "forward":
        inputs[0].requires_grad_()
        inputs.append(torch.randn(case.B, case.K + 2, case.D).to(case.dtype))
    inputs, forms = on_device(inputs), forms_of(case.K)
    exact = with_gradient(forms["official"], *in_fp64(inputs, IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    checked = parity(exact, {name: with_gradient(form, *inputs) for name, form in forms.items()})
    work = work_of(case, direction)
    facts, step = compare(forms, inputs, work, direction=direction, rounds=rounds)
    record(step, **facts, op="reduce", **described(case), parity=checked, left_out=left_out)
