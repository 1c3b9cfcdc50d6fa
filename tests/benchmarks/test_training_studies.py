"""`benchmarks.real.finetune` and `clip`: arms, ends of a run, results that continue, and times."""

import json

import pytest
import timm
import torch

import elip_models
from benchmarks.real import clip, dinov2, finetune, materials, training
from benchmarks.real.training import Arm, Optimization

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


def test_both_ends_begin_from_the_same_state(folder):
    """A run whose two ends are trained alike ends equally twice, on the same photographs."""
    study = finetune.Clothes(folder, PIXELS)
    torch.manual_seed(0)
    learner = study.learner().train()
    learner.reduce(Arm("merge", 0.5))
    optimization = Optimization(learner, STEPS)
    optimization.run(study, 5)
    state = optimization.state()
    weights = []
    for _ in range(2):
        optimization.load(state)
        optimization.run(study, 3)
        weights.append(torch.cat([weight.detach().flatten() for weight in learner.parameters()]))
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.cat([w.flatten() for w in state[1].values()]))


@pytest.mark.parametrize("study", [finetune.Clothes, clip.Flickr8k])
def test_a_seed_repeats_a_run(study, folder):
    study = study(folder, PIXELS)
    runs = [training.train(study, Arm("merge", 0.5), 1, STEPS) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_clip_begins_with_the_fitted_projections(folder):
    study = clip.Flickr8k(folder, PIXELS)
    learner = study.learner().eval()
    photographs = study.test_photographs.batch(torch.arange(len(study.test.paths)))
    texts = materials.text_features(study.test.captions, folder / "all-MiniLM-L6-v2")
    with torch.no_grad():
        scores = study.scores(learner)
        expected = study.maps.recalls(learner.tower(photographs), texts)
    assert scores == {name: round(each.mean().item(), 5) for name, each in expected.items()}


def test_captions_guide_a_clip_in_training(folder, monkeypatch):
    study = clip.Flickr8k(folder, PIXELS)
    learner, batch, texts = study.learner(), study.batch(), []
    guidance = elip_models.guidance

    def recorded(tower, text):
        texts.append(text)
        return guidance(tower, text)

    monkeypatch.setattr(elip_models, "guidance", recorded)
    learner.reduce(Arm("merge", 0.5))
    learner.loss(*batch)
    assert not texts
    learner.reduce(Arm.parse("elip:scorer=exact 0.5"))
    learner.loss(*batch)
    torch.testing.assert_close(texts[0], materials.pooled(learner.text, *batch[1:]))
