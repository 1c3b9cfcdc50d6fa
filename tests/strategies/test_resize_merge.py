"""`resize_merge`: the tower of a smaller image, whose tokens merge; one `keep` sets both."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed

import elip_models
from elip_models import ResizeMerge, TokenMerging
from elip_models.strategies import ImageResize
from elip_models.strategies.flops import at_keep, inference_ratio, kept_share
from elip_models.towers import TowerSize, as_tower
from tests.helpers.own_warnings import SLOW_SCORER
from tests.helpers.towers import plain_vit

SMALL = TowerSize((224, 224), 256, 1, width=384, hidden=1536, heads=6, depth=12)
"""Of a ViT-S/14."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return plain_vit(depth=6).eval()


def test_it_merges_the_tokens_of_a_model_for_smaller_images(model):
    side = as_tower(model).image_size[0]
    images = torch.randn(2, 3, side, side)
    resize = ImageResize(size=side // 2)
    smaller = plain_vit(depth=6, img_size=side // 2).eval()
    grid = (side // 16, side // 16)
    positions = resample_abs_pos_embed(model.pos_embed, grid, num_prefix_tokens=1)
    smaller.load_state_dict(model.state_dict() | {"pos_embed": positions})
    expected = elip_models.encode_image(
        smaller, resize.resize(as_tower(model), images), strategy=TokenMerging(r=1)
    )
    strategy = ResizeMerge(size=side // 2, r=1)
    assert strategy.token_counts(as_tower(model).size)[0].attention == 10
    tokens = elip_models.encode_image(model, images, strategy=strategy)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.5, 0.4, 0.3])
def test_keep_sets_image_and_merges(keep):
    strategy = at_keep(ResizeMerge(), SMALL, keep)
    assert kept_share(strategy, SMALL) == pytest.approx(keep, rel=0.02)
    assert strategy.size < 224 and strategy.r > 0
    assert inference_ratio(strategy, SMALL) == pytest.approx(keep, abs=0.06)
    fixed = at_keep(ResizeMerge(size=196), SMALL, min(keep, 0.7))
    assert fixed.size == 196 and kept_share(fixed, SMALL) == pytest.approx(min(keep, 0.7), rel=0.02)


@SLOW_SCORER
@pytest.mark.parametrize(
    ("options", "heights"),
    [({"size": 32, "keep": 0.3}, (32, 32)), ({"r": 3}, (48, 96))],
    ids=["size", "r"],
)
def test_images_of_other_sizes_have_the_height_of_the_setting_or_their_own(options, heights):
    torch.manual_seed(0)
    model = plain_vit(depth=4, dynamic_img_size=True).eval()
    side = as_tower(model).image_size[0]
    batches = [torch.randn(2, 3, side * i, side * 2) for i in (1, 2)]
    encoded = [
        elip_models.encode_image(
            model, images, strategy="resize_merge", return_info=True, **options
        )
        for images in batches
    ]
    elip_models.reduce_(model, strategy="resize_merge", **options)
    for images, (tokens, infos), height in zip(batches, encoded, heights, strict=True):
        assert torch.equal(model.forward_features(images), tokens)
        width = height * images.shape[3] // images.shape[2]
        assert infos[0].reduction.slots.shape[1] == 1 + height * width // 8**2


def test_a_reduced_model_compiles_as_one_graph(model):
    elip_models.reduce_(model, strategy="resize_merge", keep=0.5)
    images = torch.randn(2, 3, *as_tower(model).image_size)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), model(images))
