"""`torch.compile` sees the kernels of every op; a size that may change leaves an op."""

from contextlib import contextmanager

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

import elip_kernels
import elip_models
from elip_kernels._example import EXAMPLES, Sizes, tensors_of
from elip_kernels._triton import HAS_TRITON
from tests.helpers.tiers import first_quick, slow_except
from tests.helpers.towers import images, plain_vit

if not HAS_TRITON:
    pytest.skip("triton is absent, so there are no kernels", allow_module_level=True)

from benchmarks.kernel_analysis.stub_device import stub_device

B, N, D, K, H = 2, 50, 96, 30, 3
SIZES = Sizes(B, N, D, K, H, torch.bfloat16)


@contextmanager
def recorded_graphs():
    """Yield a backend of `torch.compile`, and the list that its graphs are added to."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    with stub_device(90):
        yield aot_autograd(fw_compiler=record, bw_compiler=record), graphs


def launches_of(graphs):
    """Return (kernel, tensors it writes) of each launch, and the ops that are left."""
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    launches = [
        (named(kernel_side_table.get_kernel(node.kwargs["kernel_idx"])), written(node))
        for node in nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
    return launches, [str(node.target) for node in nodes if str(node.target).startswith("elip.")]


def named(kernel):
    """Return the name of a kernel, which has a wrapper for its number of warps."""
    return kernel.fn.__name__ if callable(kernel.fn) else kernel.fn.fn.__name__


def written(node):
    return set(node.kwargs["tensors_to_clone"])


def run(function, name):
    """Call an op on its example forward and, if it has a gradient, backward; return the example.

    Infos are not made: PyTorch computes weights from outputs that the stub does not write.
    """
    torch.manual_seed(0)
    arguments = EXAMPLES[name].arguments(SIZES)
    arguments.pop("return_info", None)
    (first, leaf), *_ = arguments.items()
    out, *_ = tensors_of(function(**arguments | {first: leaf.requires_grad_()}))
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    return arguments


@pytest.mark.parametrize("name", first_quick(["reduce", "cls_attention", "score_reduce"], 2))
def test_a_graph_has_the_launches_of_the_op_and_only_outputs_are_written(name):
    op = EXAMPLES[name].function
    with stub_device(90) as driver:
        run(op, name)
        expected = [function for _, _, function, _ in driver.launches]
    with recorded_graphs() as (backend, graphs):
        arguments = run(torch.compile(op, backend=backend, fullgraph=True), name)
    launches, ops = launches_of(graphs)
    assert [kernel for kernel, _ in launches] == expected and not ops
    for kernel, tensors in launches:
        assert not tensors & {f"{argument}_ptr" for argument in arguments}, kernel


def reduced(tokens, row):
    return elip_kernels.reduce(tokens, row, K)


def test_a_batch_size_that_changes_keeps_the_kernels_and_another_size_the_op():
    tokens, row = torch.randn(B, N, D), torch.rand(B, N)
    cases = (0, ["_reduce_fwd_kernel"], []), (1, [], ["elip.reduce_opaque.default"])
    for dim, kernels, left in cases:
        with recorded_graphs() as (backend, graphs):
            for tensor in (tokens, row):
                torch._dynamo.mark_dynamic(tensor, dim)
            torch.compile(reduced, backend=backend, fullgraph=True)(tokens, row)
        launches, ops = launches_of(graphs)
        assert ([kernel for kernel, _ in launches], ops) == (kernels, left)
        tokens, row = tokens.clone(), row.clone()


MODELS = {
    "tome": ["_match_kernel", "_slots_kernel", "_order_kernel", "_merge_fwd_kernel"],
    "elip": ["_query_kernel", "scores_kernel", "_score_select_kernel", "_move_kernel"],
}


@pytest.mark.parametrize("strategy", slow_except([], MODELS))
def test_the_graph_of_a_reduced_model_has_kernels_in_place_of_ops(strategy):
    model = elip_models.reduce_(plain_vit().eval(), strategy, keep=0.5)
    with recorded_graphs() as (backend, graphs), torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(images(B))
        launches, ops = launches_of(graphs)
    assert {kernel for kernel, _ in launches} == set(MODELS[strategy]) and not ops
