"""score_reduce: row and reduction as one op, and the kernels of a stage boundary."""

import pytest
import torch
from torch.library import opcheck
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import elip_kernels
import elip_models
from elip_kernels._triton import HAS_TRITON
from elip_kernels.ops.absorbed_query import QueryArguments
from elip_kernels.testing import RecordedCalls
from elip_models.strategies.elip import ELIP
from elip_models.strategies.strategy import Context
from elip_models.towers import Tower, as_tower
from elip_models.towers.tower_data import Query
from tests.helpers.models import open_clip_vit
from tests.helpers.towers import SCHEDULE, WIDTH, clip_vit, images, plain_vit, text

B, N, D, H, K = 2, 21, 24, 3, 8


def block(dtype=torch.float32):
    arguments = {
        "norm_weight": torch.randn(D),
        "norm_bias": torch.randn(D),
        "q_weight": torch.randn(D, D) / 5,
        "q_bias": torch.randn(D),
        "k_weight": torch.randn(D, D) / 5,
    }
    return {n: v.to(dtype) for n, v in arguments.items()} | {"num_heads": H, "eps": 1e-6}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("keep", [1, K, N - 2, 0.4])
def test_is_the_row_and_then_reduce(keep, merge):
    tokens, cls, arguments = torch.randn(B, N, D), torch.randn(B, D), block()
    row = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    ours, theirs = (tokens.clone().requires_grad_() for _ in range(2))
    expected, info = elip_kernels.reduce(theirs, row, keep, merge=merge, return_info=True)
    got, got_info, got_row = elip_kernels.score_reduce(
        ours, cls, keep, merge=merge, return_info=True, **arguments
    )
    assert torch.equal(got, expected)
    assert torch.equal(got_row, row)
    assert torch.equal(got_info.kept, info.kept)
    assert torch.equal(got_info.weights, info.weights)
    grad = torch.randn_like(got)
    got.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
    assert not got_row.requires_grad


@pytest.mark.parametrize("merge", [True, False])
def test_a_row_selects_again_and_nothing_is_scored(merge):
    tokens, cls, arguments = torch.randn(B, N, D), torch.randn(B, D), block()
    options = {"merge": merge, "return_info": True, **arguments}
    ours, theirs = (tokens.clone().requires_grad_() for _ in range(2))
    expected, info, row = elip_kernels.score_reduce(theirs, cls, K, **options)
    with FlopCounterMode(display=False) as counter:
        got, again, same = elip_kernels.score_reduce(ours, cls * 0, K, row=row, **options)
    assert counter.get_total_flops() == 2 * B * D * (N - 1 - K) * merge
    assert (
        torch.equal(got, expected) and torch.equal(same, row) and torch.equal(again.kept, info.kept)
    )
    grad = torch.randn_like(got)
    got.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scored_tokens_may_differ_from_moved_tokens(dtype):
    scored, cls, arguments = torch.randn(B, N, D).to(dtype), torch.randn(B, D), block()
    row = elip_kernels.cls_attention_from_tokens(scored, cls, **arguments)
    ours, theirs = (torch.ones(B, N, 1) * torch.randn(N, D) for _ in range(2))
    theirs.copy_(ours)
    ours.requires_grad_(), theirs.requires_grad_(), scored.requires_grad_()
    expected, info = elip_kernels.reduce(theirs, row, K, return_info=True)
    options = {"scored": scored, "return_info": True, **arguments}
    got, its, own = elip_kernels.score_reduce(ours, cls, K, **options)
    assert torch.equal(got, expected)
    assert torch.equal(own, row)
    assert torch.equal(its.kept, info.kept)
    got.sum().backward()
    expected.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert scored.grad is None


def arguments_of_the_op(dtype=torch.float32):
    """Return small arguments, because a second-order gradcheck takes two calls per number."""
    tokens = torch.randn(2, 7, 4, dtype=dtype, requires_grad=True)
    cls, text, (gamma, beta, bias) = torch.randn(2, 4), torch.randn(1, 4), torch.randn(3, 4)
    matrices = torch.randn(4, 4), bias, torch.randn(4, 4)
    query = QueryArguments(cls, text, 0.7, False, gamma, beta, 1e-6, *matrices, 2, 0.5)
    return tokens, query, 3, True, None, None


@pytest.mark.slow
def test_opcheck_and_gradcheck():
    tokens, query, *others = arguments_of_the_op()
    opcheck(torch.ops.elip.score_reduce.default, (tokens, *query, *others))
    for row in (torch.rand(2, 7), torch.rand(7, 2).t(), torch.rand(2, 7).double()):
        opcheck(torch.ops.elip.score_reduce.default, (tokens, *query, *others[:-1], row))
    for dtype in (torch.bfloat16, torch.float64):
        scored = torch.randn(2, 7, 4, dtype=dtype)
        opcheck(torch.ops.elip.score_reduce.default, (tokens, *query, *others[:-2], scored, None))
    tokens, query, *others = arguments_of_the_op(torch.float64)
    # The row depends on the tokens, but passes no gradient: a large margin keeps the selection.
    query = query._replace(k_weight=query.k_weight * 0)

    def out(t):
        return torch.ops.elip.score_reduce(t, *query, *others)[0]

    assert torch.autograd.gradcheck(out, (tokens,))
    assert torch.autograd.gradgradcheck(lambda t: out(t).square(), (tokens,))


VIEWS = {
    "detach",
    "select",
    "as_strided",
    "chunk",
    "split",
    "narrow",
    "slice",
    "unbind",
    "squeeze",
    "unsqueeze",
}
ALLOCATE = {"empty", "empty_strided", "new_empty", "new_zeros", "zero_", "fill_"}
"""The recorder clears what is allocated."""
BOUNDARY = ["_query_kernel", "scores_kernel", "_score_select_kernel", "_move_kernel"]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so nothing is launched")
@pytest.mark.parametrize("batch", [1, 96])
def test_a_stage_boundary_of_last_launches_the_same_kernels_whatever_the_batch(batch):
    from benchmarks.kernel_analysis.compile import recorded_launches

    arguments = {"schedule": SCHEDULE, "scorer": "last"}
    with recorded_launches(90) as launches, RecordedCalls() as recorded:
        elip_models.encode_image(clip_vit(), images(batch), text(batch), **arguments)
    assert [op for op, _ in recorded.calls] == ["score_reduce"] * 3
    assert [launch.name for launch in launches] == BOUNDARY * 3


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so nothing is launched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [plain_vit, open_clip_vit])
@pytest.mark.parametrize("scorer", ["last", "cls", "exact", "bf16", "alternate", 2])
def test_a_stage_boundary_launches_nothing_else(scorer, make, dtype, monkeypatch):
    """Without fusion and blocks of a dry run: PyTorch only makes views and allocates memory."""
    from benchmarks.kernel_analysis.compile import recorded_launches

    monkeypatch.setattr(Tower, "run_block_without_hooks", lambda tower, i, tokens: tokens)
    monkeypatch.setattr(Tower, "cls_block", lambda tower, i, tokens, cls: cls)
    if scorer != "last":  # which fuses in its kernel
        monkeypatch.setattr(Query, "into", lambda query, tokens: tokens)
    tower = as_tower(make().to(dtype).eval())
    tokens, t = torch.randn(2, 37, WIDTH).to(dtype), text(2).to(dtype)
    strategy = ELIP("3(100%) 3(50%)", scorer=scorer, guidance_norm="match")
    stage, context = strategy.stages(tower.size)[0], Context(text_cls=t)
    with recorded_launches(90) as launches, torch.no_grad(), profile() as seen:
        strategy.step(tower, stage, tokens, context)
    assert [launch.name for launch in launches] == BOUNDARY
    ops = {event.name.removeprefix("aten::") for event in seen.events()}
    assert ops <= {"elip::score_reduce"} | VIEWS | ALLOCATE, ops
