"""Time of bipartite_merge, and of select_tokens with merge_nearest.

Each is compared with an eager form, its compiled form, and a copy.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import described, directions, sweep
from benchmarks.comparison import compare
from benchmarks.kernel_analysis import least_work
from benchmarks.parity import OURS, in_fp64, on_device, parity, with_compiled, with_gradient
from elip_kernels import bipartite_merge, merge_nearest, select_tokens

CHANNELS = 64  # the metric is the head mean of the keys
MERGED = 16
IMAGES = 8  # compared with fp64: the first and last images


def eager_bipartite(tokens: Tensor, metric: Tensor, r: int, size: Tensor) -> tuple[Tensor, Tensor]:
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


def eager_nearest(
    tokens: Tensor, metric: Tensor, scores: Tensor, K: int, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Select and merge with topk, gather, argmax and scatter_add; sizes are one more channel."""
    B, _, D = tokens.shape
    with torch.no_grad():
        kept = scores[:, 1:].topk(K).indices.sort(dim=1).values + 1
        unit = torch.nn.functional.normalize(metric.to(size.dtype), dim=-1)
        targets = unit.gather(1, kept[..., None].expand(-1, -1, unit.shape[2]))
        slots = 1 + torch.bmm(unit, targets.mT).argmax(dim=-1)
        slots = slots.scatter(1, kept, torch.arange(1, 1 + K, device=kept.device).expand(B, -1))
        slots[:, 0] = 0
    sums = torch.cat([tokens * size[..., None], size[..., None]], dim=2)
    rows = slots[..., None].expand(-1, -1, D + 1)
    sums = sums.new_zeros(B, 1 + K, D + 1).scatter_add(1, rows, sums)
    return (sums[..., :-1] / sums[..., -1:]).to(tokens.dtype), sums[..., -1]


def timed(record, rounds, case, direction, forms, inputs, forward, rows, **facts):
    """Compare the forms, time them and record the result.

    `forms` take tokens, metric and further inputs, and merge into `rows` rows. `forward` is the
    work of the forward pass.
    """
    tokens, *others = inputs
    others.append(torch.randint(1, 5, (case.B, case.N)).float())
    if direction != "forward":
        tokens.requires_grad_()
        others.append(torch.randn(case.B, rows, case.D).to(case.dtype))
    inputs = on_device([tokens, *others])
    exact = with_gradient(forms["eager"], *in_fp64(inputs, IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    checked = parity(exact, {name: with_gradient(form, *inputs) for name, form in forms.items()})
    shape = case.B, case.N, case.D, case.N - rows, case.dtype
    backward = least_work.bipartite_merge_backward(*shape, has_size=True)
    works = {"forward": forward, "backward": backward}
    work = works.get(direction) or least_work.together(forward, backward)
    measured, step = compare(forms, inputs, work, direction=direction, rounds=rounds)
    record(step, **measured, **facts, parity=checked, left_out=left_out)


@pytest.mark.cases(case=sweep, direction=directions)
def test_bipartite_merge(record, rounds, case, direction):
    inputs = case.inputs()[0], torch.randn(case.B, case.N, CHANNELS).to(case.dtype)
    forms = {
        "eager": lambda tokens, metric, size: eager_bipartite(tokens, metric, MERGED, size),
        OURS: lambda tokens, metric, size: bipartite_merge(tokens, metric, MERGED, size=size),
    }
    shape = case.B, case.N, case.D, CHANNELS, MERGED, case.dtype
    work, rows = least_work.bipartite_merge(*shape, has_size=True), case.N - MERGED
    facts = described(case, r=MERGED, C=CHANNELS) | {"op": "bipartite_merge"}
    timed(record, rounds, case, direction, forms, inputs, work, rows, **facts)


@pytest.mark.cases(case=sweep, direction=directions)
def test_merge_nearest(record, rounds, case, direction):
    tokens, scores = case.inputs()
    metric = torch.randn(case.B, case.N, CHANNELS).to(case.dtype)
    inputs = tokens, metric, torch.nn.functional.pad(scores, (1, 0))
    forms = {
        "eager": lambda tokens, metric, scores, size: eager_nearest(
            tokens, metric, scores, case.K, size
        ),
        OURS: lambda tokens, metric, scores, size: merge_nearest(
            tokens, select_tokens(scores, case.K), metric, size=size
        ),
    }
    shape = case.B, case.N, case.D, CHANNELS, case.K, case.dtype
    work = least_work.together(
        least_work.select(case.B, case.N, case.K),
        least_work.merge_nearest(*shape, has_size=True),
    )
    facts = described(case, K=case.K, C=CHANNELS) | {"op": "merge_nearest"}
    timed(record, rounds, case, direction, forms, inputs, work, 1 + case.K, **facts)
