"""The ops under opcheck and torch.compile with CUDA tensors."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from torch.library import opcheck

import elip_kernels
from elip_kernels.ops.absorbed_query import QueryArguments
from tests.gpu import ops
from tests.gpu.ops import HALF, TOKENS, on, pick

pytestmark = pytest.mark.gpu
elip = torch.ops.elip
# tests/kernels runs all of opcheck without a GPU.
check = partial(opcheck, **pick({}, {"test_utils": ("test_schema", "test_faketensor")}))
BACKEND = pick("inductor", "aot_eager")
GRAPHS = pick({"mode": "reduce-overhead"}, {"backend": BACKEND})
N, KEEP = pick((197, 127), (TOKENS, 11))
BATCHES = pick(((8, 127), (16, 78), (24, 176)), ((2, 11), (3, 7)))  # B, keep
every_dtype = pytest.mark.parametrize("dtype", pick(ops.DTYPES[:2], ops.DTYPES[:1]), ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@every_dtype
def test_opcheck_of_reduce(device, dtype):
    tokens, scores, grad_out = on(device, ops.reduce_inputs(2, 50, dtype, 64))
    arguments = (scores, None, grad_out.shape[1] - 2, 1, True, True)
    check(elip.reduce.default, (tokens.requires_grad_(), *arguments))
    _, _, weights, slots = elip.reduce(tokens, *arguments)
    check(elip.reduce_backward.default, (grad_out, slots, weights, True))


@every_dtype
def test_opcheck_of_rows(device, dtype):
    check(elip.cls_attention.default, (*on(device, ops.row_inputs(2, 50, dtype)), None, 0.125))
    q, k = on(device, ops.column_mean_inputs(2, 50, dtype))
    counts = torch.ones(2, 50, dtype=torch.bool, device=device)
    check(elip.attention_column_mean.default, (q, k, counts, counts, 0.125))
    tokens, cls, *block = on(device, ops.block_inputs(2, 50, dtype, 64))
    made = ops.named(*block) | {"cls": cls, "text": cls.flip(0), "fusion": 0.7, "match": True}
    arguments = (tokens.requires_grad_(), *QueryArguments(**made, scale=0.125))
    check(elip.cls_attention_from_tokens.default, arguments)
    check(elip.cls_attention_output.default, (*arguments, made["k_weight"].clone(), None))
    check(elip.score_reduce.default, (*arguments, 20, True, True, None, None))


@every_dtype
def test_opcheck_of_bipartite_merge(device, dtype):
    inputs = on(device, ops.bipartite_inputs(2, 50, dtype, 64))
    tokens, metric, size, penalty, grad_out = inputs
    r = 50 - grad_out.shape[1]
    check(elip.bipartite_match.default, (metric, penalty, r, 1))
    arguments = (tokens.requires_grad_(), size, elip.bipartite_match(metric, None, r, 1), 50 - r)
    check(elip.bipartite_merge.default, arguments)
    _, sizes = elip.bipartite_merge(*arguments)
    check(elip.bipartite_merge_backward.default, (grad_out, size, sizes, arguments[2]))


@every_dtype
def test_opcheck_of_merge_nearest(device, dtype):
    tokens, kept, metric, size, _ = on(device, ops.nearest_inputs(2, 50, dtype, 64))
    check(elip.select.default, (size, None, 20, 1))
    check(elip.nearest_match.default, (metric, kept, 1))
    slots = elip.nearest_match(metric, kept, 1)
    check(elip.bipartite_merge.default, (tokens.requires_grad_(), size, slots, 1 + kept.shape[1]))


@every_dtype
def test_opcheck_of_selections(device, dtype):
    tokens, relevance = on(device, ops.candidates(2, 50, dtype, 64))
    first = torch.tensor([3, 7], device=device)
    check(elip.select_diverse.default, (tokens.requires_grad_(), relevance > 0.01, first, 20))
    check(elip.select_dpp.default, (tokens, relevance, relevance > 0.01, 20))


def reduced(tokens, cls, *block, keep):
    row = elip_kernels.cls_attention_from_tokens(tokens, cls, **ops.named(*block))
    return elip_kernels.reduce(tokens, row, keep)


def score_reduced(tokens, cls, *block, keep):
    return elip_kernels.score_reduce(tokens, cls, keep, **ops.named(*block))


@pytest.mark.parametrize("boundary", [reduced, score_reduced])
def test_compiles_whole_and_once_for_all_batches_and_counts(device, launches, boundary):
    compiles = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(boundary, fullgraph=True, backend=compiles, dynamic=True)
    for B, keep in BATCHES:
        tokens, *others = on(device, ops.block_inputs(B, N, HALF))
        ours, eager = (tokens.clone().requires_grad_() for _ in range(2))
        got, expected = compiled(ours, *others, keep=keep), boundary(eager, *others, keep=keep)
        upstream = torch.randn_like(got)
        got.backward(upstream)
        expected.backward(upstream)
        ops.assert_alike((got.detach(), ours.grad), (expected.detach(), eager.grad))
    assert compiles.frame_count == 1
    assert launches["_reduce_bwd_kernel"] == 2 * len(BATCHES)  # compiled and eager


def test_a_graph_of_the_compiler_replays(device):
    compiled = torch.compile(reduced, fullgraph=True, **GRAPHS)
    counters.clear()
    with torch.no_grad():
        for _ in range(pick(4, 2)):
            inputs = on(device, ops.block_inputs(pick(8, 2), N, HALF))
            got, expected = compiled(*inputs, keep=KEEP), reduced(*inputs, keep=KEEP)
            ops.assert_alike((got,), (expected,))
    manager = cudagraph_trees.get_manager(device.index, create_if_none_exists=False)
    assert manager is not None and any(manager.get_roots()), "no graph was recorded"
    assert counters["inductor"]["cudagraph_skips"] == 0
