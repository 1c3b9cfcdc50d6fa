"""torch.onnx.export of a reduced model, run by onnxruntime.

Where two scores differ by less than a rounding, each library may keep another of the two: models
whose blocks attend evenly are not compared.
"""

import io

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import elip_kernels
import elip_models
from elip_kernels._example import EXAMPLES, Sizes, tensors_of
from elip_models import (
    RandomPruning,
)
from elip_models.towers import as_tower
from tests.helpers.strategies import WITHOUT_TEXT
from tests.helpers.towers import SCHEDULE, WIDTH, images, plain_vit

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # two libraries' fp32, sums in another order
BATCH = torch.export.Dim("batch")


def exported(model, args, dynamic=None):
    """Return the model's ONNX program, for any batch size if `dynamic`."""
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(model, args, file, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    return onnx.load_from_string(file.getvalue())


def opened(program):
    return onnxruntime.InferenceSession(
        program.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def run(session, *args):
    """Return the outputs for these inputs, in the order of the model's inputs."""
    names = (each.name for each in session.get_inputs())
    found = session.run(None, {name: arg.numpy() for name, arg in zip(names, args, strict=True)})
    return [torch.from_numpy(each) for each in found]


@torch.no_grad()
def assert_runs_alike(program, model, *args):
    """Check the outputs, and that no node loses sums when several threads add to one row."""
    nodes = [node for node in program.graph.node if node.op_type == "ScatterND"]
    assert not [
        node for node in nodes if any(attribute.s == b"add" for attribute in node.attribute)
    ]
    expected = [t for t in pytree.tree_leaves(model(*args)) if isinstance(t, torch.Tensor)]
    torch.testing.assert_close(run(opened(program), *args), expected, **CLOSE)


@pytest.mark.slow
def test_onnxruntime_returns_what_pytorch_returns_for_any_batch():
    """`tests/commands/test_export.py` has other strategies."""
    model = elip_models.reduce_(plain_vit().eval(), strategy=WITHOUT_TEXT["nearest"])
    program = exported(model, (images(),), dynamic=({0: BATCH},))
    for batch in (1, 2, 5):
        assert_runs_alike(program, model, images(batch))


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_becomes_a_file_for_any_batch():
    """`tests/benchmarks/test_onnx_exports.py` has other strategies, and any image size."""
    model = elip_models.reduce_(plain_vit().eval(), "elip", keep=0.6)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: BATCH},))
    graph = exported(program, ())
    for batch in (1, 5):
        assert_runs_alike(graph, model, images(batch))


@pytest.mark.slow
def test_random_draws_in_every_run_and_keeps_what_it_drew(monkeypatch):
    """The graph draws random numbers; the same numbers give the same result in both."""
    model = elip_models.reduce_(plain_vit().eval(), strategy=RandomPruning(SCHEDULE))
    x = images()
    program = exported(model, (x,))
    draws = [n.output[0] for n in program.graph.node if n.op_type.startswith("RandomUniform")]
    assert len(draws) == len(RandomPruning(SCHEDULE).stages(as_tower(model).size))
    program.graph.output.extend(onnx.ValueInfoProto(name=name) for name in draws)
    session = opened(program)
    first, second = (run(session, x) for _ in range(2))
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
    features, *drawn = second
    monkeypatch.setattr(torch, "rand", lambda *size, device: drawn.pop(0).view(size))
    with torch.no_grad():
        torch.testing.assert_close(model(x), features, **CLOSE)
    assert not drawn


class OpCall(nn.Module):
    """Call an op with other tensors in place of those of `arguments`; return all tensors."""

    def __init__(self, op, arguments):
        super().__init__()
        self.op, self.arguments = op, arguments
        self.names = [name for name, value in arguments.items() if torch.is_tensor(value)]

    def forward(self, *tensors):
        return tensors_of(self.op(**self.arguments | dict(zip(self.names, tensors, strict=True))))


def example(name):
    sizes = Sizes(B=2, N=9, D=WIDTH, K=6, H=2, dtype=torch.float32)
    return EXAMPLES[name].function, EXAMPLES[name].arguments(sizes)


def with_mask(name):
    """Return the example of an op, with a mask and other options that examples lack."""
    op, arguments = example(name)
    mask = torch.rand(2, 9) < 0.5
    mask[:, 0] = True
    return op, arguments | {"mask": mask} | OPTIONS.get(name, {})


OPTIONS = {"select_diverse": {"first": torch.tensor([3, 7])}}
MASKED = ["reduce", "cls_attention", "attention_column_mean", "select_diverse", "select_dpp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, example) for name in EXAMPLES), *((name, with_mask) for name in MASKED)],
)
def test_every_op(name, make):
    model = OpCall(*make(name))
    inputs = tuple(model.arguments[key] for key in model.names)
    assert_runs_alike(exported(model, inputs), model, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("p", "N", "r"), [(0, 12, 6), (4, 13, 4)])
def test_bipartite_merge_with_ties_and_without_direction(p, N, r, dynamic):
    """Half of the patches are equal; one has no direction, and one no weight."""
    tokens, metric = torch.randn(2, N, 8), torch.randn(2, N, 4)
    metric[:, N // 2 :] = metric[:, -1:]
    metric[:, 5] = 0.0
    size, penalty = torch.randint(0, 3, (2, N)).float(), torch.rand(2, N).round()
    options = {"r": r, "num_prefix_tokens": p, "return_info": True}
    arguments = {"tokens": tokens, "metric": metric, "size": size, "penalty": penalty}
    model = OpCall(elip_kernels.bipartite_merge, arguments | options)
    inputs = tuple(arguments.values())
    program = exported(model, inputs, dynamic=((4 * ({0: BATCH},)),) if dynamic else None)
    assert_runs_alike(program, model, *inputs)


class Kept(nn.Module):
    """Return the tokens that a call keeps."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, tokens, scores):
        return elip_kernels.reduce(tokens, scores, self.keep, return_info=True)[1].kept


@pytest.mark.slow
@pytest.mark.parametrize("keep", [2, 5])
def test_ties_go_to_the_lower_index_and_nan_after_all_numbers(keep):
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[nan, 0.5, -inf, 0.5, 0.5, nan, inf, 0.0, -0.0, nan], [0.25] * 10])
    args = torch.randn(2, 11, 3), scores
    assert_runs_alike(exported(Kept(keep), args), Kept(keep), *args)
