"""Gradient caching: a batch in slices has the gradients of the whole batch, for less memory."""

import copy

import pytest
import torch

from elip_models.profiling.measure import saved_bytes
from tests.helpers.tiers import tiered
from tests.helpers.towers import assert_equal_gradients, gradients
from tests.pretraining.models.test_clip import batch, tiny

SIZES = {"vision_depth": 3, "schedule": "1(100%) 1(75%) 1(50%)"}
STRATEGIES = {
    "last": {"scorer": "last"},
    "exact": {"scorer": "exact"},
    "nearest": {"scorer": "last", "merge": "nearest"},
    "guided_tome": {"strategy": "guided_tome"},
    "evit": {"strategy": "evit"},
    "dense": {"schedule": None},
    "sigmoid": {"loss": "sigmoid"},
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", tiered(STRATEGIES, ["last", "guided_tome"]))
def test_gradients_are_those_of_the_whole_batch(name, checkpointed):
    model, inputs = tiny(**SIZES | STRATEGIES[name]).double(), batch(6)
    other, inputs["images"] = copy.deepcopy(model), inputs["images"].double()
    expected = model(**inputs)
    expected.loss.backward()
    other.set_batch_slices(4)  # of two, two, one and one
    other.set_grad_checkpointing(checkpointed)
    output = other(**inputs)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    assert_equal_gradients(gradients(other), gradients(model), rtol=1e-9, atol=1e-12)


def test_gradient_caching_saves_less_for_backward():
    model, inputs, saved = tiny(**SIZES), batch(8), []
    for slices in (1, 4):
        model.set_batch_slices(slices)
        with saved_bytes(model.parameters()) as count:
            model(**inputs)
        saved.append(count())
    assert saved[1] < saved[0] / 5
