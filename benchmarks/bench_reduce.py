"""reduce, forward and backward, against the official algorithm, a good eager form, and a copy."""

import pytest
import torch

import elip_kernels
from benchmarks.official_reduce import eager_reduce, official_reduce
from elip_models.profile import ratios_to, time_side_by_side

SHAPES = [(64, 257, 768, 166), (64, 197, 768, 127), (1, 257, 768, 166)]


@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-N{0[1]}-D{0[2]}-K{0[3]}".format)
@pytest.mark.parametrize("direction", ["forward", "training"])
def test_reduce(benchmark, report, device, direction, shape):
    B, N, D, K = shape
    tokens = torch.randn(B, N, D, device=device, requires_grad=direction == "training")
    scores = torch.randn(B, N - 1, device=device).softmax(-1)
    grad = torch.randn(B, K + 2, D, device=device)
    forms = {"official": official_reduce, "eager": eager_reduce, "reduce": elip_kernels.reduce}
    outputs = {name: form(tokens, scores, K) for name, form in forms.items()}
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["official"], atol=1e-5, rtol=0, msg=name)

    def run(form):
        out = form(tokens, scores, K)
        if direction == "training":
            torch.autograd.grad(out, tokens, grad)

    steps = {name: (lambda form=form: run(form)) for name, form in forms.items()}
    steps["copy of the output"] = lambda: grad.clone()
    times = time_side_by_side(steps, device=device, rounds=15)
    report(ratios_to("official", times), shape=list(shape), direction=direction)
    benchmark.pedantic(run, (elip_kernels.reduce,), rounds=3, warmup_rounds=1)
