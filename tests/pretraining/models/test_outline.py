"""A model that is loaded without random values first is the model that was saved."""

import pytest
import torch
from torch import nn

from elip_models.pretraining.models.registry import create_model
from elip_models.saving.meta_build import WithoutRandomValues


@pytest.mark.parametrize("name", ["clip_tiny", "albef_tiny", "blip_tiny", "meter_tiny"])
def test_a_loaded_model_has_the_tensors_of_the_saved_one(name, tmp_path):
    model = create_model(name)
    loaded = type(model).from_pretrained(model.save_pretrained(tmp_path))
    for saved, tensors in (
        (model.named_parameters(), dict(loaded.named_parameters())),
        (model.named_buffers(), dict(loaded.named_buffers())),
    ):
        for name, tensor in saved:
            other = tensors.pop(name)
            assert torch.equal(tensor, other) and tensor.requires_grad == other.requires_grad
        assert not tensors


def test_only_random_values_are_zeros():
    with WithoutRandomValues():
        norm, table = nn.LayerNorm(3), torch.arange(3.0) ** 2
        for draw in (nn.init.normal_, nn.init.trunc_normal_, nn.init.kaiming_uniform_):
            weight = torch.full((2, 2), 7.0)  # beyond the bounds of `trunc_normal_`
            assert draw(weight) is weight and weight.eq(0).all()
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
    assert table.tolist() == [0, 1, 4]
