"""Time of select_tokens with merge_nearest against an eager form and a copy."""

import pytest
import torch
from torch import Tensor

from benchmarks.bench_bipartite import CHANNELS, IMAGES
from benchmarks.cases import described, directions, sweep
from benchmarks.comparison import compare
from benchmarks.kernel_analysis import least_work
from benchmarks.parity import OURS, in_fp64, on_device, parity, with_compiled, with_gradient
from elip_kernels import merge_nearest, select_tokens


def eager_merge(
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


def work_of(case, direction):
    shape, more = (case.B, case.N, case.D), {"has_size": True}
    forward = least_work.together(
        least_work.select(case.B, case.N, case.K),
        least_work.merge_nearest(*shape, CHANNELS, case.K, case.dtype, **more),
    )
    merged_away = case.N - 1 - case.K
    backward = least_work.bipartite_merge_backward(*shape, merged_away, case.dtype, **more)
    works = {"forward": forward, "backward": backward}
    return works[direction] if direction in works else least_work.together(*works.values())


@pytest.mark.cases(case=sweep, direction=directions)
def test_merge_nearest(record, rounds, case, direction):
    tokens, scores = case.inputs()
    metric = torch.randn(case.B, case.N, CHANNELS).to(case.dtype)
    scores = torch.nn.functional.pad(scores, (1, 0))
    inputs = [tokens, metric, scores, torch.randint(1, 5, (case.B, case.N)).float()]
    if direction != "forward":
        tokens.requires_grad_()
        inputs.append(torch.randn(case.B, 1 + case.K, case.D).to(case.dtype))
    inputs = on_device(inputs)
    forms = {
        "eager": lambda tokens, metric, scores, size: eager_merge(
            tokens, metric, scores, case.K, size
        ),
        OURS: lambda tokens, metric, scores, size: merge_nearest(
            tokens, select_tokens(scores, case.K), metric, size=size
        ),
    }
    exact = with_gradient(forms["eager"], *in_fp64(inputs, IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    checked = parity(exact, {name: with_gradient(form, *inputs) for name, form in forms.items()})
    facts, step = compare(
        forms, inputs, work_of(case, direction), direction=direction, rounds=rounds
    )
    facts |= described(case, K=case.K, C=CHANNELS)
    record(step, **facts, op="merge_nearest", parity=checked, left_out=left_out)
