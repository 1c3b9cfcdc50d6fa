"""Time of bipartite_merge against an eager form, its compiled form, and a copy."""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import described, directions, sweep
from benchmarks.comparison import compare
from benchmarks.kernel_analysis import least_work
from benchmarks.parity import OURS, in_fp64, on_device, parity, with_compiled, with_gradient
from elip_kernels.ops.bipartite import bipartite_merge

CHANNELS = 64  # the metric is the head mean of the keys
MERGED = 16
IMAGES = 8  # compared with fp64: the first and last images


def eager_merge(tokens: Tensor, metric: Tensor, r: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """Merge with argsort, gather and scatter_add; sizes are one more channel."""
    with torch.no_grad():
        unit = torch.nn.functional.normalize(metric.to(size.dtype), dim=-1)
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
    return (sums[..., :-1] / sums[..., -1:]).to(tokens.dtype), sums[..., -1]


def work_of(case, direction):
    shape = (case.B, case.N, case.D)
    forward = least_work.bipartite_merge(*shape, CHANNELS, MERGED, case.dtype, has_size=True)
    backward = least_work.bipartite_merge_backward(*shape, MERGED, case.dtype, has_size=True)
    works = {"forward": forward, "backward": backward}
    return works[direction] if direction in works else least_work.together(*works.values())


@pytest.mark.cases(case=sweep, direction=directions)
def test_bipartite_merge(record, rounds, case, direction):
    tokens, metric = case.inputs()[0], torch.randn(case.B, case.N, CHANNELS).to(case.dtype)
    inputs = [tokens, metric, torch.randint(1, 5, (case.B, case.N)).float()]
    if direction != "forward":
        tokens.requires_grad_()
        inputs.append(torch.randn(case.B, case.N - MERGED, case.D).to(case.dtype))
    inputs = on_device(inputs)
    forms = {
        "eager": lambda tokens, metric, size: eager_merge(tokens, metric, MERGED, size),
        OURS: lambda tokens, metric, size: bipartite_merge(tokens, metric, MERGED, size=size),
    }
    exact = with_gradient(forms["eager"], *in_fp64(inputs, IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    checked = parity(exact, {name: with_gradient(form, *inputs) for name, form in forms.items()})
    work = work_of(case, direction)
    facts, step = compare(forms, inputs, work, direction=direction, rounds=rounds)
    facts |= described(case, r=MERGED, C=CHANNELS)
    record(step, **facts, op="bipartite_merge", parity=checked, left_out=left_out)
