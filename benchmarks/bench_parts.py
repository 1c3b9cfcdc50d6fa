"""Time of three selections, merge and unmerge against an eager form and a copy."""

from functools import partial

import pytest
import torch
from torch import Tensor

import elip_kernels
from benchmarks.cases import described, sweep
from benchmarks.comparison import compare
from benchmarks.kernel_analysis import least_work
from benchmarks.kernel_analysis.least_work import INT32, Work
from benchmarks.parity import OURS, in_fp64, on_device, parity, with_compiled
from elip_kernels import BipartiteInfo

SELECTED = 16  # of diverse tokens: more steps would also select by rounding
IMAGES = 8  # compared with fp64: the first and last images


def eager_select(scores: Tensor, K: int) -> tuple[Tensor]:
    """Select by topk and sort: scores (B, N), column 0 of CLS -> (B, K)."""
    return (scores[:, 1:].topk(K).indices.sort(dim=1).values + 1,)


def eager_merge(tokens: Tensor, slots: Tensor, size: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Merge by scatter_add with sizes as one more channel -> (B, R, D), (B, R)."""
    B, _, D = tokens.shape
    sums = torch.cat([tokens * size[..., None], size[..., None]], dim=2)
    rows = slots.long()[..., None].expand(-1, -1, D + 1)
    sums = sums.new_zeros(B, R, D + 1).scatter_add(1, rows, sums)
    return (sums[..., :-1] / sums[..., -1:]).to(tokens.dtype), sums[..., -1]


def eager_unmerge(merged: Tensor, slots: Tensor) -> tuple[Tensor]:
    """Unmerge by gather: (B, R, D) -> (B, N, D)."""
    return (merged.gather(1, slots.long()[..., None].expand(-1, -1, merged.shape[2])),)


def eager_diverse(tokens: Tensor, K: int) -> tuple[Tensor]:
    """Select by the greedy max-min rule, one token after the other: (B, N, D) -> (B, K)."""
    unit = torch.nn.functional.normalize(tokens, dim=2)
    cosine = unit @ unit.mT
    rows = torch.arange(len(tokens), device=tokens.device)
    alone = cosine - 4 * torch.eye(tokens.shape[1], dtype=cosine.dtype, device=cosine.device)
    kept = [alone.amax(2).argmin(1)]
    nearest = cosine[rows, kept[0]]
    for _ in range(K - 1):
        kept.append(nearest.scatter(1, torch.stack(kept, 1), 2.0).argmin(1))
        nearest = torch.maximum(nearest, cosine[rows, kept[-1]])
    return (torch.stack(kept, 1).sort(1).values,)


def eager_dpp(tokens: Tensor, relevance: Tensor, K: int) -> tuple[Tensor]:
    """Select by the greedy determinantal rule (Chen et al., 2018): (B, N, D) -> (B, K)."""
    unit = torch.nn.functional.normalize(tokens, dim=2)
    kernel = relevance[:, :, None] * (unit @ unit.mT) * relevance[:, None]
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    rows, columns, kept = torch.arange(len(tokens), device=tokens.device), [], []
    for _ in range(K):
        kept.append(gain.argmax(1))
        column = kernel[rows, kept[-1]]
        for earlier in columns:
            column = column - earlier * earlier[rows, kept[-1], None]
        columns.append(column / gain[rows, kept[-1], None].sqrt())
        gain = gain - columns[-1].square()
        gain[rows, kept[-1]] = -torch.inf
    return (torch.stack(kept, 1).sort(1).values,)


def slots_of(case):
    """Draw the row of each token (B, N), none of the R = K + 1 rows empty."""
    R = case.K + 1
    rows = torch.cat([torch.arange(R), torch.randint(R, (case.N - R,))])
    return torch.stack([rows[torch.randperm(case.N)] for _ in range(case.B)]).int()


def select_forms(case):
    inputs = (torch.nn.functional.pad(case.inputs()[1], (1, 0)),)
    work = least_work.select(case.B, case.N, case.K)
    ours = lambda scores: (elip_kernels.select_tokens(scores, case.K),)  # noqa: E731
    return {"eager": partial(eager_select, K=case.K), OURS: ours}, inputs, work


def diverse_forms(case):
    K, inputs = min(case.K, SELECTED), case.inputs()[:1]
    work = least_work.select_diverse(case.B, case.N, case.D, K, case.dtype)
    ours = lambda tokens: (elip_kernels.select_diverse(tokens, K),)  # noqa: E731
    return {"eager": partial(eager_diverse, K=K), OURS: ours}, inputs, work


def dpp_forms(case):
    K, inputs = min(case.K, SELECTED), (case.inputs()[0], torch.rand(case.B, case.N) + 0.1)
    work = least_work.select_dpp(case.B, case.N, case.D, K, case.dtype, has_relevance=True)
    ours = lambda tokens, relevance: (  # noqa: E731
        elip_kernels.select_dpp(tokens, K, relevance=relevance),
    )
    return {"eager": partial(eager_dpp, K=K), OURS: ours}, inputs, work


def merge_forms(case):
    def ours(tokens, slots, size):
        return elip_kernels.apply_merge(tokens, BipartiteInfo(slots, R), size=size)

    R = case.K + 1
    inputs = case.inputs()[0], slots_of(case), torch.randint(1, 5, (case.B, case.N)).float()
    work = least_work.apply_merge(case.B, case.N, case.D, R, case.dtype, has_size=True)
    return {"eager": partial(eager_merge, R=R), OURS: ours}, inputs, work


def unmerge_forms(case):
    R = case.K + 1
    inputs = torch.randn(case.B, R, case.D).to(case.dtype), slots_of(case)
    row = case.B * case.D * case.dtype.itemsize
    read = {"merged": R * row, "slots": case.B * case.N * INT32}
    ours = lambda merged, slots: (elip_kernels.unmerge(merged, BipartiteInfo(slots, R)),)  # noqa: E731
    return {"eager": eager_unmerge, OURS: ours}, inputs, Work(read, {"out": case.N * row}, 0)


OPS = {
    "select_tokens": select_forms,
    "select_diverse": diverse_forms,
    "select_dpp": dpp_forms,
    "apply_merge": merge_forms,
    "unmerge": unmerge_forms,
}


@pytest.mark.cases(case=sweep)
@pytest.mark.parametrize("op", OPS)
def test_parts(record, rounds, op, case):
    forms, inputs, work = OPS[op](case)
    inputs = on_device(inputs)
    exact = forms["eager"](*in_fp64(inputs, IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    checked = parity(exact, {name: form(*inputs) for name, form in forms.items()})
    facts, step = compare(forms, inputs, work, direction="forward", rounds=rounds)
    facts |= described(case, K=case.K)
    record(step, **facts, op=op, parity=checked, left_out=left_out)
