"""Patch dropout, random, adaptive and resize on towers, against their definitions."""

import copy

import pytest
import torch

import elip_models
from elip_models import AdaptiveELIP, ImageResize, PatchDropout, RandomPruning
from tests.helpers.models import TOWERS, output
from tests.helpers.towers import images, plain_vit, text


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


def test_adaptive_keeps_the_fewest_patches_with_the_share_of_attention():
    model, x, t = plain_vit(), images(8), text(8)
    strategy = AdaptiveELIP("3(100%) 3(50%)", keep_mass=0.3)
    _, (info,) = elip_models.encode_image(model, x, t, strategy=strategy, return_info=True)
    kept = 0
    for b in range(8):
        row = info.attention[b, 1:]
        order = row.argsort(descending=True)
        k = 1
        while row[order[:k]].sum() < 0.3 * row.sum() and k < 18:
            k += 1
        real = info.reduction.mask[b, 1:-1]
        assert real.sum() == k
        assert info.reduction.kept[b][real].tolist() == sorted((order[:k] + 1).tolist())
        kept += k
        source = info.reduction.source_map()[b]
        assert source.sum(0).tolist() == [1] * 37  # every token in one place
        assert source[-1].sum() == 36 - k
    assert info.mean_keep == kept / 8
    assert 0 < kept < 8 * 18


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
