"""`benchmarks.real.ideas`: its forward passes."""

import pytest
import timm
import torch

import elip_models
from benchmarks.real.adaptive_batches import batch_flops
from benchmarks.real.ideas import DECREASING, IDEAS, Idea, calibrated, forward
from elip_models import ImageResize, TokenMerging
from elip_models.reduction.flops import inference_ratio
from elip_models.towers import as_tower


@pytest.fixture(scope="module")
def dino():
    """DINOv2 ViT-S/14 with random weights, and blocks that matter."""
    torch.manual_seed(0)
    options = {"img_size": 224, "num_classes": 0, "init_values": 1.0}
    return timm.create_model("vit_small_patch14_dinov2", **options).eval()


@pytest.mark.parametrize(
    ("idea", "strategy"),
    [
        (Idea(), None),
        (Idea(154), ImageResize(size=154)),
        (Idea(flops=0.5), TokenMerging),
        (Idea(flops=0.5, weights=DECREASING, class_token_only=True), TokenMerging),
    ],
)
@torch.no_grad()
def test_an_idea_of_the_library_is_its_strategy(dino, idea, strategy):
    images = torch.randn(2, 3, 224, 224)
    if strategy is TokenMerging:
        merges = tuple(idea.merges(384))
        strategy = TokenMerging(r=merges, class_token_only=idea.class_token_only)
    if strategy is None:
        expected, flops = dino(images), 1.0
    else:
        expected = elip_models.encode_image(dino, images, strategy=strategy)[:, 0]
        flops = inference_ratio(strategy, as_tower(dino).size)
    torch.testing.assert_close(forward(dino, images, idea), expected, atol=2e-5, rtol=1e-4)
    assert idea.relative_flops(idea.merges(384), 384) == pytest.approx(flops, abs=0.01)


def test_every_idea_costs_what_its_name_says():
    for name, idea in IDEAS.items():
        _, comma, share = name.rpartition(", 0")
        if comma:
            flops = idea.relative_flops(idea.merges(384), 384)
            assert flops == pytest.approx(float("0" + share), abs=0.005), name


@pytest.mark.parametrize(
    "options",
    [
        {"pixels": 70, "image_sizes": True},
        {"pixels": 70, "temperature": True},
        {"coarse": 60},
        {"flops": 0.5, "protect": 1.0},
    ],
)
@torch.no_grad()
def test_each_option_changes_the_features(dino, options):
    images = torch.randn(1, 3, 224, 224)
    without = {key: value for key, value in options.items() if key in ("pixels", "flops")}
    features = forward(dino, images, Idea(**options))
    assert features.shape == (1, 384)
    assert not torch.equal(features, forward(dino, images, Idea(**without)))


@torch.no_grad()
def test_thresholds_merge_the_same_number_on_average(dino):
    images, idea = torch.randn(3, 3, 224, 224), Idea(flops=0.5, adaptive=True)
    fixed = idea._replace(adaptive=False)
    limits = calibrated(dino, images[:1], idea)
    alone = forward(dino, images[:1], idea, limits)
    torch.testing.assert_close(alone, forward(dino, images[:1], fixed), atol=2e-5, rtol=1e-4)
    limits = calibrated(dino, images, idea)
    features = forward(dino, images, idea, limits)
    assert not torch.allclose(features, forward(dino, images, fixed), atol=1e-3)


def test_a_batch_costs_what_its_longest_image_costs_in_each_block():
    idea = Idea()
    few, many = [0, 4] + [0] * 10, [8, 0] + [0] * 10
    longest = [0, 4] + [0] * 10
    assert batch_flops(idea, [few, many], 2, 384) == idea.relative_flops(longest, 384)
    alone = [idea.relative_flops(each, 384) for each in (few, many)]
    assert batch_flops(idea, [few, many], 1, 384) == pytest.approx(sum(alone) / 2)
    crossing = [8] + [0] * 11, [0, 20] + [0] * 10  # the longest differs by block
    assert batch_flops(idea, crossing, 2, 384) == idea.relative_flops([0, 8] + [0] * 10, 384)
