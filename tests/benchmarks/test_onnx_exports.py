"""The exports of `benchmarks.onnx_exports`: the same outcome as in the committed results."""

import pytest

from benchmarks.onnx_exports import (
    BOUND,
    COMMITTED,
    exported,
    measured,
    small_model,
    supported_operators,
)
from elip_models import STRATEGIES
from elip_models.saving.files import read_object

OUTCOMES = {"error", "draws", "refused", "failed"}


def committed():
    return read_object(COMMITTED)["strategies"]


def test_the_committed_results_have_every_strategy_and_no_wrong_output():
    assert committed().keys() == STRATEGIES.keys()
    for shapes in committed().values():
        for entry in (entry for routes in shapes.values() for entry in routes.values()):
            assert len(OUTCOMES & entry.keys()) == 1
            assert entry.get("error", 0.0) <= BOUND
            assert entry.get("draws", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "shape", "route"),
    [
        ("merge", "any image size", "model"),
        ("tome", "any batch size", "program"),
        ("evit", "any image size", "model"),
        ("guided_tome", "one batch size", "program"),
        ("elip", "any image size", "program"),
        ("trips", "any batch size", "model"),
        ("random", "any batch size", "program"),
        ("resize_merge", "any batch size", "model"),
    ],
)
def test_an_export_has_the_outcome_of_the_committed_results(strategy, shape, route):
    """With fewer blocks than there, of which each adds seconds to an export."""
    entry = measured(strategy, shape, route, depth=3)
    assert entry.keys() == committed()[strategy][shape][route].keys() - {"openvino"}
    assert entry.get("error", 0.0) <= BOUND
    assert entry.get("draws", True)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "most"), [("tome", 68), ("merge", 75)])
def test_a_merging_block_has_few_nodes(strategy, most):
    """A dense block has 31. A file for one image has a node less in each block."""
    small, large = (
        len(exported(small_model(strategy, depth=depth), "one batch size", "model").graph.node)
        for depth in (2, 3)
    )
    assert large - small <= most


def test_an_operator_without_a_y_is_not_supported():
    page = (
        "| Add | Y | FP32 |\n| Bernoulli | N |\n| TopK                      | Y          | FP32 |\n"
    )
    assert supported_operators(page) == {"Add", "TopK"}
