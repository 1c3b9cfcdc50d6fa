"""bipartite_merge, forward and backward, against a good eager form and a copy."""

import pytest
import torch
from torch import Tensor

from elip_kernels.bipartite import bipartite_merge
from elip_models.profile import ratios_to, time_side_by_side

SHAPES = [(64, 197, 768, 16), (64, 257, 768, 64), (1, 257, 768, 16)]
CHANNELS = 64  # the metric is the head mean of the keys


def eager_merge(tokens: Tensor, metric: Tensor, r: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """The same by argsort, gather and scatter_add, sizes as one more channel."""
    with torch.no_grad():
        unit = torch.nn.functional.normalize(metric.float(), dim=-1)
        similarity = torch.bmm(unit[:, ::2], unit[:, 1::2].mT)
        similarity[:, 0] = -torch.inf
        best, partner = similarity.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        stays, goes = order[:, r:].sort(dim=-1).values, order[:, :r]
        width = tokens.shape[2] + 1
        stays, goes, into = (
            index[..., None].expand(-1, -1, width)
            for index in (stays, goes, partner.gather(1, goes))
        )
    sums = torch.cat([tokens * size[..., None], size[..., None]], dim=2)
    even, odd = sums[:, ::2], sums[:, 1::2]
    sums = torch.cat([even.gather(1, stays), odd.scatter_add(1, into, even.gather(1, goes))], dim=1)
    return sums[..., :-1] / sums[..., -1:], sums[..., -1]


@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-N{0[1]}-D{0[2]}-r{0[3]}".format)
@pytest.mark.parametrize("direction", ["forward", "training"])
def test_bipartite_merge(benchmark, report, device, direction, shape):
    B, N, D, r = shape
    tokens = torch.randn(B, N, D, device=device, requires_grad=direction == "training")
    metric = torch.randn(B, N, CHANNELS, device=device)
    size = torch.randint(1, 5, (B, N), device=device).float()
    grad = torch.randn(B, N - r, D, device=device)
    forms = {
        "eager": lambda: eager_merge(tokens, metric, r, size),
        "bipartite_merge": lambda: bipartite_merge(tokens, metric, r, size=size),
    }
    for got, expected in zip(*(form() for form in forms.values()), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    def run(form):
        merged, _ = form()
        if direction == "training":
            torch.autograd.grad(merged, tokens, grad)

    steps = {name: (lambda form=form: run(form)) for name, form in forms.items()}
    steps["copy of the output"] = lambda: grad.clone()
    times = time_side_by_side(steps, device=device, rounds=15)
    report(ratios_to("eager", times), shape=list(shape), direction=direction)
    benchmark.pedantic(run, (forms["bipartite_merge"],), rounds=3, warmup_rounds=1)
