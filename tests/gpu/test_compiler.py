"""The ops under opcheck and torch.compile with CUDA tensors."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from torch.library import opcheck

import elip_kernels
from elip_kernels._operator import OPERATORS
from elip_kernels.testing import RecordedCalls
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


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", pick(ops.DTYPES[:2], ops.DTYPES[:1]), ids=str)
@pytest.mark.parametrize("name", ops.OPS)
def test_opcheck_of_the_ops_of_a_call(device, name, dtype):
    with RecordedCalls() as recorded:
        ops.OPS[name].outputs(ops.example(name, device, 2, 50, dtype))
    for op, (first, *others) in dict(reversed(recorded.calls)).items():
        leaf = first.detach().requires_grad_(OPERATORS[op].has_gradient)
        check(OPERATORS[op].overload, (leaf, *others))


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
    # a compiled graph on a GPU makes its own launches
    assert launches["_reduce_bwd_kernel"] == pick(1, 2) * len(BATCHES)


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
