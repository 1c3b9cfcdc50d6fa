"""The ops under opcheck and torch.compile with CUDA tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager
from torch.library import opcheck

import elip_kernels
from tests.gpu import ops
from tests.gpu.ops import on

pytestmark = pytest.mark.gpu
elip = torch.ops.elip


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_reduce(device, dtype):
    tokens, scores, grad_out = on(device, ops.reduce_inputs(2, 50, dtype, 64))
    arguments = (scores, None, grad_out.shape[1] - 2, 1, True, True)
    opcheck(elip.reduce.default, (tokens.requires_grad_(), *arguments))
    _, _, weights, slots = elip.reduce(tokens, *arguments)
    opcheck(elip.reduce_backward.default, (grad_out, slots, weights, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_rows(device, dtype):
    opcheck(elip.cls_attention.default, (*on(device, ops.row_inputs(2, 50, dtype)), None, 0.125))
    tokens, cls, *_ = on(device, ops.block_inputs(2, 50, dtype, 64))
    query = torch.randn(2, 4, 64, device=device)
    arguments = (tokens.requires_grad_(), cls.float(), query, 1e-6)
    opcheck(elip.cls_attention_from_tokens.default, arguments)
    opcheck(elip.cls_attend_from_tokens.default, arguments)
    opcheck(elip.score_reduce.default, (*arguments, 20, True, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_bipartite_merge(device, dtype):
    tokens, metric, size, grad_out = on(device, ops.bipartite_inputs(2, 50, dtype, 64))
    r = 50 - grad_out.shape[1]
    opcheck(elip.bipartite_match.default, (metric, r, 1))
    arguments = (tokens.requires_grad_(), size, elip.bipartite_match(metric, r, 1), 50 - r)
    opcheck(elip.bipartite_merge.default, arguments)
    _, sizes = elip.bipartite_merge(*arguments)
    opcheck(elip.bipartite_merge_backward.default, (grad_out, size, sizes, arguments[2]))


def reduced(tokens, cls, *block, keep):
    row = elip_kernels.cls_attention_from_tokens(tokens, cls, **ops.named(*block))
    return elip_kernels.reduce(tokens, row, keep)


def score_reduced(tokens, cls, *block, keep):
    return elip_kernels.score_reduce(tokens, cls, keep, **ops.named(*block))


@pytest.mark.parametrize("boundary", [reduced, score_reduced])
def test_compiles_whole_and_once_for_all_batches_and_counts(device, launches, boundary):
    compiles = CompileCounterWithBackend("inductor")
    compiled = torch.compile(boundary, fullgraph=True, backend=compiles, dynamic=True)
    for B, keep in ((8, 127), (16, 78), (24, 176)):
        tokens, *others = on(device, ops.block_inputs(B, 197, torch.bfloat16))
        ours, eager = (tokens.clone().requires_grad_() for _ in range(2))
        got, expected = compiled(ours, *others, keep=keep), boundary(eager, *others, keep=keep)
        upstream = torch.randn_like(got)
        got.backward(upstream)
        expected.backward(upstream)
        ops.assert_alike((got.detach(), ours.grad), (expected.detach(), eager.grad))
    assert compiles.frame_count == 1
    assert launches["_reduce_bwd_kernel"] == 6  # on both sides, three times


def test_a_graph_of_the_compiler_replays(device):
    compiled = torch.compile(reduced, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    with torch.no_grad():
        for _ in range(4):
            inputs = on(device, ops.block_inputs(8, 197, torch.bfloat16))
            got, expected = compiled(*inputs, keep=127), reduced(*inputs, keep=127)
            ops.assert_alike((got,), (expected,))
    manager = get_manager(device.index, create_if_none_exists=False)
    assert manager is not None and any(manager.get_roots()), "no graph was recorded"
    assert counters["inductor"]["cudagraph_skips"] == 0
