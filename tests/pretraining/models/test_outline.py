"""A model that is made without memory and then filled is the model that is made at once."""

import pytest
import torch
from torch import nn

from elip_models.pretraining.models.registry import create_model
from elip_models.saving.meta_build import at_most, meta_device, with_memory
from elip_models.saving.weights import load_weights


class Tied(nn.Module):
    """Two names of one weight, a buffer that is not stored, and a number as tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.5), persistent=False)


def filled(make, weights):
    with meta_device(len(weights)):
        outline = make()
    model = with_memory(outline, make, weights)
    load_weights(model, weights)
    return model, model is outline


@pytest.mark.parametrize("name", ["clip_tiny", "albef_tiny", "blip_tiny", "meter_tiny"])
def test_our_models_are_made_once(name):
    model = create_model(name)
    again, once = filled(lambda: type(model)(model.config), model.state_dict())
    assert once
    for expected, tensors in (
        (model.named_parameters(), again.named_parameters()),
        (model.named_buffers(), again.named_buffers()),
    ):
        pairs = dict(tensors)
        for name, tensor in expected:
            other = pairs.pop(name)
            assert torch.equal(tensor, other) and tensor.requires_grad == other.requires_grad
        assert not pairs


def test_a_shared_weight_stays_shared():
    made = Tied()
    again, once = filled(Tied, made.state_dict())
    assert once and again.second.weight is again.first.weight
    assert again.scale == 2.5
    assert torch.equal(again.first.weight, made.first.weight)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "missing"])
def test_a_model_with_values_of_its_own_is_made_again(kind):
    def make():
        model = nn.Linear(2, 2)
        if kind == "buffer":
            model.register_buffer("table", torch.arange(3).float() ** 2, persistent=False)
        if kind == "attribute":
            model.table = torch.arange(3).float() ** 2
        return model

    given = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    if kind == "missing":
        del given["bias"]
    with meta_device(2):
        outline = make()
    model = with_memory(outline, make, given)
    assert model is not outline
    assert not any(each.is_meta for each in model.state_dict().values())
    if kind != "missing":
        assert torch.equal(model.table, torch.tensor([0.0, 1.0, 4.0]))


def test_a_model_of_more_numbers_than_its_file_is_refused():
    with pytest.raises(ValueError, match="at most 100 numbers"), at_most(10, 100), meta_device(10):
        nn.Linear(10, 11)
    with at_most(10, 100):  # what has memory was compared before
        nn.Linear(10, 11)
