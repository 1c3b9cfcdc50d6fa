"""The state of a forward pass is freed with its graph."""

import weakref

import pytest
import torch

import elip_models
from elip_models.engine.forward_state import ForwardState
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiers import slow_except
from tests.helpers.towers import clip_vit, images, text
from tests.strategies.test_strategies import strategies


@pytest.fixture
def forwards(monkeypatch):
    """Return weak references to all forwards that were started."""
    begun, original = [], ForwardState.__init__

    def init(self, *args, **kwargs):
        begun.append(weakref.ref(self))
        original(self, *args, **kwargs)

    monkeypatch.setattr(ForwardState, "__init__", init)
    return begun


def alive(forwards):
    return sum(each() is not None for each in forwards)


@UNGUIDED
@strategies
@pytest.mark.parametrize("grad", slow_except([True], [True, False]))
def test_without_checkpoints_nothing_is_kept(forwards, strategy, grad):
    model = clip_vit()
    elip_models.reduce_(model, strategy=strategy)
    with torch.set_grad_enabled(grad), elip_models.guidance(model, text(2)):
        outputs = [model(images(2)) for _ in range(3)]
    assert alive(forwards) == 0
    assert len(forwards) == (0 if strategy.name == "resize" else len(outputs))


@UNGUIDED
@strategies
def test_a_checkpoint_keeps_its_forward_until_its_graph_ends(forwards, strategy):
    if strategy.name == "resize":
        pytest.skip("no block of it has a step")
    model, batches = clip_vit(), 3
    elip_models.reduce_(model, strategy=strategy)
    model.set_grad_checkpointing()
    with elip_models.guidance(model, text(2)):
        losses = [model(images(2)).square().sum() for _ in range(batches)]
    assert alive(forwards) == len(forwards) == batches
    losses.pop().backward()
    assert alive(forwards) == batches - 1
    losses.clear()  # one that never runs backward
    assert alive(forwards) == 0
