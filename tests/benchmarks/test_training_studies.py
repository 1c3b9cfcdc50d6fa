"""`benchmarks.real.finetune` and `clip`: arms, results that continue, and times."""

import json

import pytest
import timm
import torch

from benchmarks.real import clip, dinov2, finetune
from benchmarks.real.training import Arm

PIXELS, STEPS = 64, 20


@pytest.fixture(autouse=True)
def small_tower(monkeypatch):
    sizes = {"depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 0}

    def timm_model(pixels):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=pixels, **sizes).eval()

    monkeypatch.setattr(dinov2, "timm_model", timm_model)
    monkeypatch.setattr(clip.Flickr8k, "batch_size", 6)


def test_arms_are_read():
    assert Arm.parse("dense") == Arm()
    assert Arm.parse("dense 0.5") == Arm(share=0.5)
    assert Arm.parse("dense 0").share == 0
    assert Arm.parse("merge 0.7") == Arm("merge", 0.7)
    assert Arm.parse("elip:scorer=exact 0.5") == Arm("elip:scorer=exact", 0.5)
    assert all(Arm.parse(text) for text in (*finetune.Clothes.arms, *clip.Flickr8k.arms))


@pytest.mark.parametrize(
    ("study", "strategy"), [(finetune, "random 0.5"), (clip, "elip:scorer=exact 0.5")]
)
def test_a_study_continues_and_is_timed(study, strategy, folder, tmp_path):
    output = tmp_path / "runs.json"
    common = [str(folder), "--output", str(output), "--pixels", str(PIXELS)]
    common += ["--steps", str(STEPS)]
    assert study.main([*common, "--arms", "dense", "merge 0.5", "--seeds", "0"]) == 0
    first = json.loads(output.read_text())
    assert [list(run["ends"]) for run in first["runs"]] == [["dense"], ["reduced", "finished"]]
    ends = first["runs"][1]["ends"].values()
    assert all(list(scores) == ["dense", "reduced"] for scores in ends)
    assert study.main([*common, "--arms", "dense", strategy, "--seeds", "0", "1"]) == 0
    second = json.loads(output.read_text())
    assert second["runs"][:2] == first["runs"] and len(second["runs"]) == 5
    assert study.main([*common, "--time", "--rounds", "1"]) == 0
    times = json.loads(output.read_text())["time"]["ratios"]
    assert list(times) == ["dense", "merge 0.5", strategy] and times["dense"] == 1
    with pytest.raises(SystemExit):
        study.main([*common[:-1], "30"])
