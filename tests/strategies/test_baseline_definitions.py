"""Patch dropout, random and resize on towers, against their definitions."""

import copy

import pytest
import torch

import elip_models
from elip_models import ImageResize, PatchDropout, RandomPruning
from tests.helpers.models import TOWERS, output
from tests.helpers.towers import images, plain_vit


def test_patch_dropout_is_dense_in_evaluation():
    model, x = plain_vit().eval(), images()
    dense = model(x)
    elip_models.reduce_(model, strategy=PatchDropout(0.5))
    assert torch.equal(model(x), dense)


def test_random_keeps_other_patches_each_time_and_averages_the_others():
    model, x = plain_vit(), images(16)
    strategy = RandomPruning("3(100%) 3(50%)")
    runs = [
        elip_models.encode_image(model, x, strategy=strategy, return_info=True)[1][0].reduction
        for _ in range(2)
    ]
    assert not torch.equal(runs[0].kept, runs[1].kept)
    assert not torch.equal(runs[0].kept[0], runs[0].kept[1])
    weights = runs[0].weights
    torch.testing.assert_close(weights[weights > 0], torch.full((16 * 18,), 1 / 18))


@pytest.mark.parametrize("library", ["open_clip", "HF CLIP", "HF BLIP", "timm distilled"])
def test_resize_to_the_same_size_is_the_dense_model(library):
    model, x = TOWERS[library]().eval(), images()
    dense = output(model, x)
    elip_models.reduce_(model, strategy=ImageResize(48))
    torch.testing.assert_close(output(model, x), dense, atol=1e-5, rtol=1e-5)


def test_resize_equals_timms_own_interpolation():
    model, x = plain_vit().eval(), images()
    other = copy.deepcopy(model)
    other.set_input_size(32)
    smaller = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", antialias=True)
    tokens = elip_models.encode_image(model, x, strategy=ImageResize(32))
    torch.testing.assert_close(tokens, other.forward_features(smaller), atol=1e-5, rtol=1e-5)
