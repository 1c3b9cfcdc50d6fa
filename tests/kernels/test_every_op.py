"""What every op guarantees, tested with the example at the end of its file."""

import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import elip_kernels
from elip_kernels._example import EXAMPLES, Sizes, map_tensors, tensors_of
from elip_kernels._operator import OPERATORS
from elip_kernels.testing import RecordedCalls
from tests.helpers.tiers import slow_except

SMALL = Sizes(B=2, N=20, D=24, K=11, H=3, dtype=torch.float32)
every_op = pytest.mark.parametrize("name", EXAMPLES)
EAGER = [(name, "aot_eager") for name in EXAMPLES]
WITHOUT_GRADIENT = {  # rows of scores, which select, and selections
    "fuse_text",
    "cls_attention",
    "cls_attention_from_tokens",
    "cls_attention_output",
    "attention_column_mean",
    "select_diverse",
    "select_dpp",
    "select_tokens",
}


@pytest.fixture(scope="module", params=[False, True], ids=["", "masked"])
def op_arguments(request):
    """Return arguments of every op of `torch.ops.elip`, as the examples call it, or with masks."""
    with RecordedCalls() as recorded:
        for example in EXAMPLES.values():
            arguments = example.arguments(SMALL)
            if request.param:
                names = {"mask", "query_mask"} & inspect.signature(
                    example.function
                ).parameters.keys()
                arguments |= {key: torch.rand(SMALL.B, SMALL.N) < 0.8 for key in names}
            example.outputs(arguments)
    return dict(reversed(recorded.calls))


def test_every_public_op_has_an_example():
    public = [getattr(elip_kernels, name) for name in elip_kernels.__all__]
    functions = [value for value in public if inspect.isfunction(value)]
    first = {f.__name__: [*inspect.signature(f).parameters.values()][:1] for f in functions}
    ops = {name for name, of in first.items() if [p.annotation for p in of] == [torch.Tensor]}
    assert EXAMPLES.keys() == ops


def test_the_examples_call_every_op(op_arguments):
    assert op_arguments.keys() == OPERATORS.keys()


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op, op_arguments):
    first, *others = op_arguments[op]
    if first.is_floating_point() and OPERATORS[op].has_gradient:
        first = first.detach().requires_grad_()
    opcheck(OPERATORS[op].overload, (first, *others))


MAPPED = {
    "first tensor": lambda position, is_weight: position == 0,
    "images": lambda position, is_weight: not is_weight,
    "images and weights": lambda position, is_weight: True,
}
"""The arguments that `vmap` maps."""


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("op", OPERATORS)
def test_vmap_is_a_call_for_each_sample(op, mapped, op_arguments):
    op, arguments = OPERATORS[op], op_arguments[op]
    dims, samples = [], []
    for position, (x, is_weight) in enumerate(zip(arguments, op.is_weight, strict=False)):
        dims.append(1 if torch.is_tensor(x) and MAPPED[mapped](position, is_weight) else None)
        samples.append([x if dims[-1] is None else x.detach().roll(i, 0) for i in range(3)])
    stacks = [x[0] if d is None else torch.stack(x, d) for x, d in zip(samples, dims, strict=True)]
    outputs = tensors_of(torch.vmap(op.overload, tuple(dims))(*stacks))
    for i, sample in enumerate(zip(*samples, strict=True)):
        expected = tensors_of(op.overload(*sample))
        torch.testing.assert_close([output[i] for output in outputs], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_op
def test_autocast_changes_nothing(name, dtype):
    arguments = EXAMPLES[name].arguments(SMALL._replace(dtype=dtype))
    plain = EXAMPLES[name].outputs(arguments)
    with torch.autocast("cpu", torch.float16):
        mixed = EXAMPLES[name].outputs(arguments)
    for output, expected in zip(mixed, plain, strict=True):
        assert output.dtype == expected.dtype and torch.equal(output, expected)


@pytest.mark.parametrize(("name", "backend"), slow_except(EAGER, [*EAGER, ("reduce", "inductor")]))
@torch._dynamo.config.patch(specialize_float=True)  # a float that is traced is compiled twice
def test_one_graph_serves_all_batches_and_counts_forward_and_backward(name, backend):
    def tensors(arguments):
        return tensors_of(function(**constants | arguments))

    function, sizes = (
        EXAMPLES[name].function,
        [(4, 11), (5, 12), (6, 14)],
    )  # no batch has the size of a head count
    calls = [EXAMPLES[name].arguments(SMALL._replace(B=B, K=K)) for B, K in sizes]
    scalars = {key: v for key, v in calls[0].items() if isinstance(v, int | float | str)}
    constants = {key: value for key, value in scalars.items() if value == calls[1][key]}
    torch._dynamo.reset()
    compiles = CompileCounterWithBackend(backend)
    compiled = torch.compile(tensors, fullgraph=True, backend=compiles, dynamic=True)
    for arguments in calls:
        arguments = {key: value for key, value in arguments.items() if key not in constants}
        (first, leaf), *_ = arguments.items()
        results = []
        for run in (compiled, tensors):
            leaf = leaf.detach().clone().requires_grad_()
            outputs = run(arguments | {first: leaf})
            if outputs[0].requires_grad:
                outputs[0].square().sum().backward()
            results.append((outputs, leaf.grad))
        torch.testing.assert_close(*results)
    if backend == "aot_eager":  # Inductor adds guards on sizes for its own loops
        assert compiles.frame_count == 1


@every_op
def test_exports(name):
    arguments = EXAMPLES[name].arguments(SMALL)
    names = [key for key, value in arguments.items() if torch.is_tensor(value)]

    class Op(torch.nn.Module):
        def forward(self, *tensors):
            changed = arguments | dict(zip(names, tensors, strict=True))
            return tensors_of(EXAMPLES[name].function(**changed))

    inputs = tuple(arguments[key] for key in names)
    program = torch.export.export(Op(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Op()(*inputs))


@every_op
def test_meta_tensors_have_the_shapes_of_values(name):
    arguments = EXAMPLES[name].arguments(SMALL)
    on_meta = EXAMPLES[name].outputs(map_tensors(lambda tensor: tensor.to("meta"), arguments))
    for output, expected in zip(on_meta, EXAMPLES[name].outputs(arguments), strict=True):
        assert output.is_meta
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)


@every_op
def test_an_empty_batch_has_empty_outputs(name):
    arguments = EXAMPLES[name].arguments(SMALL)
    of_images = [t for t in tensors_of(tuple(arguments.values())) if len(t) == SMALL.B]
    images = {id(tensor) for tensor in of_images}
    empty = map_tensors(lambda tensor: tensor[:0] if id(tensor) in images else tensor, arguments)
    for output, expected in zip(
        EXAMPLES[name].outputs(empty), EXAMPLES[name].outputs(arguments), strict=True
    ):
        assert output.shape == (0, *expected.shape[1:])


@every_op
def test_strides_do_not_matter(name):
    def strided(tensor):
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]

    arguments = EXAMPLES[name].arguments(SMALL)
    outputs = EXAMPLES[name].outputs(map_tensors(strided, arguments))
    torch.testing.assert_close(outputs, EXAMPLES[name].outputs(arguments))


@every_op
def test_a_gradient_reaches_the_first_tensor_only(name):
    example, arguments = EXAMPLES[name], EXAMPLES[name].arguments(SMALL)
    floats = [t for t in tensors_of(tuple(arguments.values())) if t.is_floating_point()]
    first, *others = [tensor.requires_grad_() for tensor in floats]
    out, *rest = tensors_of(example.function(**arguments))
    assert not any(tensor.requires_grad for tensor in rest)
    if name in WITHOUT_GRADIENT:
        assert not out.requires_grad
    else:
        out.square().sum().backward()
        assert first.grad.any()
    assert all(tensor.grad is None for tensor in others)
