"""A training step of METER compiles to one graph with the same results."""

import copy

import pytest
import torch

from tests.helpers.cross_modal_cases import (
    assert_equal_state,
    batch_of_four,
    descend,
    draws,
    losses,
    made,
    step,
)
from tests.helpers.towers import assert_equal_gradients, gradients

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SIZES = {"vision_depth": 2, "text_depth": 1, "cross_depth": 1}
REDUCED = {"text_reduction": "learned"}


@pytest.mark.slow
def test_a_training_step_is_one_graph_that_serves_the_next_one_too():
    model = made("meter", **SIZES, schedule="1(100%) 1(50%)", **REDUCED)
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for again in (False, True):
        batch = batch_of_four()
        drawn = draws("meter", *batch, "local")
        expected, expected_gradients = step(eager, batch, drawn)
        with torch._dynamo.config.patch(error_on_recompile=again):
            got = compiled(*batch, drawn=drawn)
        model.zero_grad()
        got.loss.backward()
        torch.testing.assert_close(losses(got), expected, **CLOSE)
        assert_equal_gradients(gradients(model), expected_gradients, **CLOSE)
        descend(model)
        descend(eager)
        assert_equal_state(model, eager)
