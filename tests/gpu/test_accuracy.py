"""Every op on the device against its PyTorch implementation in fp64, at real and edge-case shapes.

Budgets: kept rows are exact; the error of attention rows is relative to the largest entry; merged
rows have an absolute error on N(0, 1) inputs, plus half an ulp if they are rounded to two bytes.
"""

import pytest
import torch

from elip_kernels import BipartiteInfo, launch
from elip_kernels._example import map_tensors
from elip_kernels.testing import Case, cases
from tests.gpu import ops
from tests.gpu.ops import (
    DTYPES,
    HALF,
    REAL,
    TOKENS,
    WIDTH,
    kernels_alone,
    on,
    pick,
    pytorch_forms,
    widened,
)

pytestmark = pytest.mark.gpu
# fp16: tensor cores round sums of sixteen products toward zero, at most D / 16 * 2^-23 = 6e-6 of a
# score at D = 768. The scores reach 5, and the error of a score is the relative one of its entry.
ROW_BUDGET = {torch.float32: 1e-5, torch.float16: 3e-5, torch.bfloat16: 2e-4}
NAN, INF = float("nan"), float("inf")
LONG = [Case(2, N, WIDTH, K, dtype) for dtype in DTYPES for N, K in ((577, 374), (1025, 512))]
SMALL = [Case(2, TOKENS, WIDTH, 9, dtype) for dtype in DTYPES]
UGLY_ROWS = [(4, 50, 384, 6), (2, 257, 1024, 16), (2, 2, 64, 1), (3, 20, 96, 24), (2, 130, 33, 3)]
UGLY_ROWS += [(2, 50, 2048, 16), (2, 50, 1664, 16)]
REAL_ROWS = [(B, N, WIDTH, ops.HEADS) for B in (4, 96) for N in REAL]
ROW_SHAPES = pick(UGLY_ROWS + REAL_ROWS, [(2, 2, 64, 1), (2, TOKENS, 66, 3)])
CHANNELS = [*((N, 64) for N in REAL), *pick([(45, 37), (1025, 80)], []), (1, 16)]  # N, d
SHARES = [*((N, 0.25) for N in REAL), *pick([(50, 0.48), (1025, 0.49)], []), (3, 0)]  # N, r / N
shape_id = "B{0[0]}-N{0[1]}-D{0[2]}-H{0[3]}".format


def assert_rounded(got, exact):
    """Allow 1e-6, and half an ulp of the dtype that the result was rounded to."""
    half_ulp = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    error = (got.cpu().double() - exact).abs()
    assert (error <= 1e-6 + half_ulp * exact.abs()).all(), error.max()


def row_error(got, exact):
    return ((got.cpu().double() - exact).abs().max() / exact.max()).item()


def check_reduce(device, inputs, mask=None, **options):
    """Check forward and backward against fp64; return the outputs on the CPU."""
    there = None if mask is None else mask.to(device)
    with kernels_alone():
        got = ops.reduce(*on(device, inputs), mask=there, **options)
    out, kept, weights, gradient = got
    exact, exact_kept, exact_weights, exact_gradient = ops.reduce(
        *widened(inputs), mask=mask, **options
    )
    assert torch.equal(kept.cpu(), exact_kept)
    assert_rounded(weights, exact_weights)
    copied = out.shape[1] - options.get("merge", True)
    assert torch.equal(out[:, :copied].cpu(), exact[:, :copied].to(out.dtype))
    assert_rounded(out, exact)
    assert_rounded(gradient, exact_gradient)
    return on("cpu", got)


@pytest.mark.parametrize("case", pick([*cases(4, WIDTH, DTYPES), *LONG], SMALL), ids=str)
def test_reduce(device, launches, case):
    grad_out = torch.randn(case.B, case.K + 2, case.D).to(case.dtype)
    check_reduce(device, (*case.inputs(), grad_out))
    assert launches.total() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", pick([1026, 4098, 16_385], [1026]))
def test_reduce_of_many_tokens(device, launches, N, dtype):
    check_reduce(device, ops.reduce_inputs(2, N, dtype, pick(WIDTH, 8)))
    assert launches.total() == 3


@pytest.mark.parametrize("keep", pick(range(1, 12), [6]))
def test_special_scores_rank_as_the_specification(device, keep):
    row = [0.0, -0.0, NAN, INF, -INF, 1.0, 1.0, 1e-42, -NAN, -1.0, 0.0, 9e2]
    scores = torch.tensor([row, [NAN] * 12, [-0.0, 0.0] * 6, [INF, -INF] * 6, [0.125] * 12])
    for merge, ranked in ((False, scores), (True, scores.abs())):  # weights are not negative
        rows = keep + 1 + merge
        inputs = (torch.randn(5, 13, WIDTH), ranked, torch.randn(5, rows, WIDTH))
        got = ops.reduce(*on(device, inputs), merge=merge)
        exact = ops.reduce(*widened(inputs), merge=merge)
        assert torch.equal(got[1].cpu(), exact[1])
        copied = inputs[0].gather(1, _rows(exact[1], WIDTH))
        assert torch.equal(got[0][:, : keep + 1].cpu(), copied)
        for ours, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(ours.cpu().double(), theirs.double(), atol=1e-6, rtol=1e-6)


def _rows(kept, D):
    """Return the positions of the copied rows, CLS included, for `gather`."""
    return torch.nn.functional.pad(kept, (1, 0))[..., None].expand(-1, -1, D)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", pick([0.05, 0.5, 0.95], [0.5]))
def test_masks(device, keep, dtype):
    inputs = ops.reduce_inputs(4, pick(197, TOKENS), dtype, keep=keep)
    real = torch.rand(inputs[0].shape[:2]) > torch.tensor([0.2, 0.5, 0.8, 1.0])[:, None]
    real[:, 0] = True
    inputs[0][~real] = NAN
    inputs[1][0, 3] = NAN
    K = inputs[2].shape[1] - 2
    got = ops.reduce(*on(device, inputs), mask=real.to(device))
    exact = ops.reduce(*widened(inputs), mask=real)
    assert torch.equal(got[1].cpu(), exact[1])
    for ours, theirs in ((got[0][:, -1], exact[0][:, -1]), (got[3], exact[3])):
        assert_rounded(ours, theirs)
    is_real = real.gather(1, got[1].cpu())
    assert torch.equal(is_real.sum(1), real[:, 1:].sum(1).clamp(max=K))


@pytest.mark.parametrize("layout", ["LND", "sliced", "every second", "expanded"])
def test_strided_inputs(device, launches, layout):
    N, D = pick(99, TOKENS), WIDTH
    tokens, scores, grad_out = on(device, ops.reduce_inputs(3, N, HALF))
    if layout == "LND":
        tokens = tokens.transpose(0, 1).contiguous().transpose(0, 1)
        grad_out = grad_out[:1].expand(3, -1, -1)
    elif layout == "sliced":  # rows that no 16-byte access fits
        tokens = torch.randn(3, N + 10, D + 13, device=device).to(HALF)[:, 3:-7, 5:-8]
        scores = torch.rand(3, 3 * N, device=device)[:, 1:-3:3]
    elif layout == "every second":
        tokens = torch.randn(3, N, 2 * D, device=device).to(HALF)[..., ::2]
    else:
        tokens = tokens[:1].expand(3, -1, -1)
    got = ops.reduce(tokens, scores, grad_out)
    expected = ops.reduce(tokens.contiguous(), scores.contiguous(), grad_out.contiguous())
    assert all(map(torch.equal, got, expected))
    assert launches.total() == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=shape_id)
def test_absorbed_row(device, launches, shape, dtype):
    B, N, D, H = shape
    inputs = ops.block_inputs(B, N, dtype, D)
    (got,) = ops.row_from_tokens(*on(device, inputs), H=H)
    (exact,) = ops.row_from_tokens(*widened(inputs), H=H)
    assert got.dtype == torch.float32
    assert row_error(got, exact) <= ROW_BUDGET[dtype]
    assert launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("N", "d"), CHANNELS)
def test_generic_row(device, launches, N, d, masked, dtype):
    q, k = ops.row_inputs(3, N, dtype, ops.HEADS, d)
    mask = torch.rand(3, N) > 0.3 if masked else None
    if masked:
        mask[:, 0] = True
    (got,) = ops.row(*on(device, (q, k, mask)))
    (exact,) = ops.row(q.double(), k.double(), mask)
    assert got.dtype == torch.float32
    assert row_error(got, exact) <= ROW_BUDGET[dtype]
    assert launches.total() == 2


RECEIVED = pick(  # heads of queries and of keys, M, N, d; each value with several of the others
    [
        *((12, 12, 197, 197, 64), (12, 4, 257, 257, 37), (8, 1, 577, 577, 128)),
        *((8, 1, 1, 257, 64), (12, 4, 257, 1, 128), (12, 12, 1025, 600, 37)),
    ],
    [(2, 1, TOKENS, TOKENS, 16), (2, 1, 3, 70, 16)],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("H", "G", "M", "N", "d"), RECEIVED)
def test_attention_received(device, launches, H, G, M, N, d, masked, dtype):
    d = min(d, 64) if dtype == torch.float32 else d  # the limit of fp32
    inputs = ops.column_mean_inputs(2, N, dtype, H, G, d, M)
    masks = [torch.rand(2, n) > 0.3 for n in (N, M)] if masked else []
    for mask in masks:
        mask[:, 0] = True
    with kernels_alone():
        (got,) = ops.attention_column_mean(*on(device, (*inputs, *masks)))
    (exact,) = ops.attention_column_mean(*widened(inputs), *masks)
    assert got.dtype == torch.float32
    assert row_error(got, exact) <= ROW_BUDGET[dtype]
    assert launches.total() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=shape_id)
def test_attention_output_of_cls(device, launches, shape, dtype):
    B, N, D, H = shape
    inputs = ops.cls_output_inputs(B, N, dtype, D)
    (got,) = ops.cls_attention_output(*on(device, inputs), H=H)
    with pytorch_forms():
        (form,) = ops.cls_attention_output(*inputs, H=H)
    (exact,) = ops.cls_attention_output(*widened(inputs), H=H)
    assert got.dtype == dtype
    assert row_error(got, exact) <= max(2 * row_error(form, exact), ROW_BUDGET[dtype])
    assert launches.total() == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in ROW_SHAPES if s[1] > 2], ids=shape_id)
def test_score_reduce(device, launches, shape, dtype):
    B, N, D, H = shape
    inputs = ops.score_reduce_inputs(B, N, dtype, D)
    out, kept, weights, row, gradient = ops.score_reduce(*on(device, inputs), H=H)
    assert launches.total() == 5  # four, and the backward of `reduce`
    (exact_row,) = ops.row_from_tokens(*widened(inputs[:-1]), H=H)
    assert row_error(row, exact_row) <= ROW_BUDGET[dtype]
    # Given this row, selection, movement and gradient are those of `reduce`.
    exact, exact_kept, exact_weights, exact_gradient = ops.reduce(
        inputs[0].double(), row.cpu().double()[:, 1:], inputs[-1].double()
    )
    assert torch.equal(kept.cpu(), exact_kept)
    assert torch.equal(out[:, :-1].cpu(), exact[:, :-1].to(dtype))
    for ours, theirs in ((weights, exact_weights), (out, exact), (gradient, exact_gradient)):
        assert_rounded(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "r"), SHARES)
def test_bipartite_merge(device, launches, N, r, dtype):
    inputs = ops.bipartite_inputs(4, N, dtype, r=r)
    merged, sizes, slots, gradient = ops.bipartite_merge(*on(device, inputs))
    exact, exact_sizes, exact_slots, exact_gradient = ops.bipartite_merge(*widened(inputs))
    assert torch.equal(slots.cpu(), exact_slots)
    assert torch.equal(sizes.cpu().double(), exact_sizes)  # small integers
    alone = BipartiteInfo(exact_slots, exact.shape[1]).source_map().sum(2) == 1
    assert torch.equal(merged.cpu()[alone], exact[alone].to(dtype))
    assert_rounded(merged, exact)
    assert_rounded(gradient, exact_gradient)
    assert launches.total() == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "share"), [*SHARES, (TOKENS, 0.001)])  # the last: all join one
def test_merge_nearest(device, launches, N, share, dtype):
    inputs = ops.nearest_inputs(4, N, dtype, share=share or 0.5)
    merged, sizes, slots, gradient = ops.merge_nearest(*on(device, inputs))
    exact, exact_sizes, exact_slots, exact_gradient = ops.merge_nearest(*widened(inputs))
    assert torch.equal(slots.cpu(), exact_slots)
    assert torch.equal(sizes.cpu().double(), exact_sizes)  # small integers
    alone = BipartiteInfo(exact_slots, exact.shape[1]).source_map().sum(2) == 1
    assert torch.equal(merged.cpu()[alone], exact[alone].to(dtype))
    assert_rounded(merged, exact)
    assert_rounded(gradient, exact_gradient)
    assert launches.total() == 4


@pytest.mark.parametrize("N", REAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("select", [ops.select_diverse, ops.select_dpp])
def test_selections(device, launches, select, dtype, N):
    inputs, mask = ops.candidates(3, N, dtype), torch.rand(3, N) < 0.8
    for options in ({}, {"mask": mask}):
        (got,) = select(*on(device, inputs), **dict(zip(options, on(device, [mask]), strict=False)))
        (exact,) = select(*widened(inputs), **options)
        assert torch.equal(got.cpu(), exact)
    assert launches


@pytest.mark.parametrize("name", ops.OPS)
def test_fp64_runs_pytorch(device, launches, name):
    check_pytorch(name, device, torch.float64)
    assert not launches


ANY_SIZE = {"_reduce_bwd_kernel", "_merge_bwd_kernel"}
ANY_SIZE |= {"_query_kernel", "_weights_kernel", "_weigh_kernel", "_value_kernel"}


@pytest.mark.parametrize("name", ops.OPS)
def test_long_inputs_run_pytorch(device, launches, monkeypatch, name):
    monkeypatch.setattr(launch, "MAX_STREAMED", 30)
    monkeypatch.setattr(launch, "MAX_SELECTED", 30)
    check_pytorch(name, device, torch.float32)
    assert launches.keys() <= ANY_SIZE


def check_pytorch(name, device, dtype):
    """Check that an op on a device returns what PyTorch returns on the CPU."""
    arguments = ops.example(name, torch.device("cpu"), 2, 60, dtype)
    outputs = ops.OPS[name].outputs(map_tensors(lambda t: t.to(device), arguments))
    with pytorch_forms():
        expected = ops.OPS[name].outputs(arguments)
    ops.assert_alike(on("cpu", outputs), expected)


@pytest.mark.parametrize("name", ops.OPS)
def test_empty_batch(device, launches, name):
    arguments = ops.example(name, torch.device("cpu"), 1, 20)
    empty = map_tensors(lambda t: t if t.shape[0] == WIDTH else t[:0], arguments)
    with pytorch_forms():
        shapes = [tuple(t.shape) for t in ops.OPS[name].outputs(empty)]
    there = map_tensors(lambda t: t.to(device), empty)
    assert [tuple(t.shape) for t in ops.OPS[name].outputs(there)] == shapes
    assert not launches
