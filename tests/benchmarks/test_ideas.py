"""`benchmarks.real.ideas` and `finetune`: their forward passes, arms, and results that continue."""

import json

import pytest
import timm
import torch

import elip_models
from benchmarks.real import dinov2, finetune
from benchmarks.real.finetune import Arm
from benchmarks.real.ideas import DECREASING, IDEAS, Idea, forward
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
    ],
)
@torch.no_grad()
def test_each_option_changes_the_features(dino, options):
    images = torch.randn(1, 3, 224, 224)
    without = {key: value for key, value in options.items() if key in ("pixels", "flops")}
    features = forward(dino, images, Idea(**options))
    assert features.shape == (1, 384)
    assert not torch.equal(features, forward(dino, images, Idea(**without)))


def test_arms_are_read():
    assert Arm.parse("dense") == Arm()
    assert Arm.parse("dense 0.5") == Arm(share=0.5)
    assert Arm.parse("merge 0.7") == Arm("merge", 0.7)
    assert Arm.parse("resize 0.5 + finish") == Arm("resize", 0.5, finish=True)
    assert all(Arm.parse(text) for text in finetune.ARMS)


def test_finetuning_continues_and_is_timed(folder, monkeypatch, tmp_path):
    sizes = {"depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 0, "img_size": 64}
    monkeypatch.setattr(
        dinov2, "timm_model", lambda _: timm.create_model("vit_tiny_patch16_224", **sizes)
    )
    output = tmp_path / "runs.json"
    common = [str(folder), "--output", str(output), "--pixels", "64", "--steps", "20"]
    arms = ["--arms", "dense", "merge 0.5 + finish", "--seeds", "0"]
    assert finetune.main([*common, *arms]) == 0
    first = json.loads(output.read_text())
    assert [run["arm"] for run in first["runs"]] == ["dense", "merge 0.5 + finish"]
    assert set(first["runs"][1]["scores"]) == {"dense", "reduced"}
    assert finetune.main([*common, "--arms", "dense", "random 0.5", "--seeds", "0", "1"]) == 0
    second = json.loads(output.read_text())
    assert second["runs"][:2] == first["runs"] and len(second["runs"]) == 5
    again = finetune.train(
        Arm(),
        0,
        finetune.Clothes.read(folder, ["train"], 64),
        finetune.Clothes.read(folder, ["validation", "test"], 64),
        20,
    )
    assert again == first["runs"][0]["scores"]  # a seed draws the same photographs and weights
    assert finetune.main([*common, "--time", "--rounds", "1"]) == 0
    times = json.loads(output.read_text())["time"]["ratios"]
    assert list(times) == ["dense", "merge 0.5", "random 0.5"] and times["dense"] == 1
    with pytest.raises(SystemExit):
        finetune.main([*common[:-1], "30", *arms])
