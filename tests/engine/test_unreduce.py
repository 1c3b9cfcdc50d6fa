"""`unreduce_` after other code replaced methods, before or after `reduce_`."""

import copy
import pickle

import pytest

import elip_models
from elip_models.api import is_reduced, record_stages
from tests.helpers.towers import SCHEDULE, images, plain_vit


@pytest.fixture
def model():
    return plain_vit()


def test_replaced_methods_of_a_user_come_back(model):
    """Both a method that raises while the model is reduced, and a block's forward."""
    x, calls = images(), []

    def mine(*args, **kwargs):
        return "mine"

    def mine_too(*args, **kwargs):
        return "mine too"

    def logged(tokens, *args, **kwargs):
        calls.append(tokens.shape[1])
        return type(model.blocks[3]).forward(model.blocks[3], tokens, *args, **kwargs)

    model.prune_intermediate_layers, model.blocks[3].forward = mine, logged
    model.forward_intermediates = mine_too
    elip_models.reduce_(model, schedule=SCHEDULE)
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")
    with pytest.raises(ValueError, match="unreduce_"):
        model.prune_intermediate_layers(3)
    assert model.forward_intermediates(x) == "mine too"
    model(x)
    assert calls == [30, 20]  # in the dry run too: it is what the block runs
    elip_models.unreduce_(model)
    assert model.prune_intermediate_layers(3) == "mine"
    assert model.forward_intermediates is mine_too
    assert model.blocks[3].forward is logged


def test_a_forward_that_was_wrapped_afterwards_raises(model):
    elip_models.reduce_(model, schedule=SCHEDULE)
    block = model.blocks[3]
    block._old_forward, block.forward = block.forward, lambda *args: block._old_forward(*args)
    model(images())
    with pytest.raises(TypeError, match="wrapped afterwards"):
        elip_models.unreduce_(model)
    block.forward = vars(block).pop("_old_forward")
    assert not is_reduced(elip_models.unreduce_(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_restored_alone_and_hooks_of_a_user_stay(model, copied):
    elip_models.reduce_(model, schedule=SCHEDULE)
    calls = CallCounter()
    model.register_forward_hook(calls)
    other = copied(model)
    elip_models.unreduce_(other)
    other(images())
    assert is_reduced(model) and vars(other).keys() == vars(plain_vit()).keys()
    with record_stages(model) as stages:
        model(images())
    elip_models.unreduce_(model)(images())
    assert stages and calls.count == 2


class CallCounter:
    count = 0

    def __call__(self, *call):
        self.count += 1
