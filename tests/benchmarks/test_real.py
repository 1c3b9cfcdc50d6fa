"""`python -m benchmarks.real.tasks`: materials, measures, results, times; weights and picture."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import elip_models
from benchmarks.real import dinov2, materials, measures, tasks
from benchmarks.real.features import features
from benchmarks.settings import read_settings
from elip_models.intervals import bootstrap_interval
from elip_models.saving.open_model import open_model
from tests.benchmarks.conftest import CAPTIONED, SPLITS
from tests.benchmarks.weights import needs_weights


@pytest.fixture
def results(folder, model, monkeypatch, tmp_path):
    """Return a function that runs the command with a small model."""
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)

    def run(*arguments):
        output = tmp_path / "results.json"
        assert tasks.main([str(folder), "--output", str(output), *map(str, arguments)]) == 0
        return json.loads(output.read_text())

    return run


def test_materials_are_read_in_order_with_labels_and_captions(folder, tmp_path):
    split = materials.clothes(folder, "train")
    assert [path.parent.name for path in split.paths] == ["flower"] * 5 + ["temple"] * 5
    assert split.labels.tolist() == [0] * 5 + [1] * 5
    captioned = materials.flickr8k(folder, "dev")
    assert [path.name for path in captioned.paths][:2] == ["dev0.png", "dev1.png"]
    assert len(captioned.paths) == CAPTIONED["dev"]
    assert captioned.captions[:6] == [*(f"a temple {k}" for k in range(5)), "a flower 0"]
    with pytest.raises(FileNotFoundError, match="folder: expected photographs in"):
        materials.clothes(tmp_path, "train")


def test_recalls_of_hand_computed_ranks():
    """Image 1 ranks a caption of image 0 first; caption 5, of image 1, ranks image 0 first."""
    maps = measures.RetrievalMaps(
        measures.Scale(torch.zeros(2), torch.ones(2)), torch.eye(2), torch.eye(2)
    )
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0]] * 4 + [[0.6, 0.8]] + [[1.0, 0.05]] + [[0.0, 1.0]] * 4)
    recalls = maps.recalls(images, texts)
    assert recalls["text_to_image_r1"].tolist() == pytest.approx([0.8, 0.8])
    assert recalls["image_to_text_r1"].tolist() == [1, 0]
    assert recalls["text_to_image_r5"].tolist() == recalls["image_to_text_r5"].tolist() == [1, 1]


def test_neighbours_vote_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(60, 8, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    points = torch.randn(40, 8, generator=generator)
    oracle = KNeighborsClassifier(
        measures.NEIGHBOURS, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = oracle.fit(train, labels).predict(points)
    correct = measures.knn_correct(points, torch.from_numpy(expected), train, labels)
    assert correct.mean() == 1


def test_a_probe_and_maps_learn_what_can_be_learnt(monkeypatch):
    monkeypatch.setattr(measures, "BATCH", 15)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    points = torch.eye(16)[labels] + 0.03 * torch.randn(120, 16, generator=generator)
    probe = measures.fitted_probe(points[:60], labels[:60], points[60:90], labels[60:90])
    assert probe.correct(points[90:], labels[90:]).mean() == 1
    assert probe.correct(points[90:], (labels[90:] + 1) % 3).mean() == 0
    images = torch.randn(200, 16, generator=generator)
    rotated = images @ torch.randn(16, 12, generator=generator)
    maps = measures.RetrievalMaps.fit(images[:150], rotated[:150].repeat_interleave(5, 0))
    recalls = maps.recalls(images[150:], rotated[150:].repeat_interleave(5, 0))
    assert recalls["text_to_image_r5"].mean() > 0.9


@pytest.mark.parametrize("text", ["tome 0.5", "tome:r=9", "resize:size=112"])
def test_features_are_those_of_the_reduced_model_and_are_computed_once(
    folder, model, monkeypatch, tmp_path, text
):
    _, setting = read_settings(text, model)
    paths = materials.clothes(folder, "test").paths
    counts = []
    found = features(setting, paths, tmp_path, seed=0, advance=counts.append)
    (images,) = dinov2.batches(paths)
    with torch.no_grad():
        torch.testing.assert_close(found, setting.model(images))
    monkeypatch.setattr(setting.model, "forward", None)
    again = features(setting, paths, tmp_path, seed=0, advance=counts.append)
    assert torch.equal(found, again) and counts == [len(paths)]
    assert not list(tmp_path.glob("*.unfinished"))


def test_features_of_a_trained_model_are_those_of_its_weights(folder, model, tmp_path):
    paths = materials.clothes(folder, "test").paths
    reduced, features_of_weights = elip_models.reduce_(copy.deepcopy(model), keep=0.5), []
    for scale in (1.0, 2.0):
        reduced.norm.weight.data.mul_(scale)
        trained = elip_models.save_reduced(reduced, tmp_path / str(scale) / "trained")
        _, setting = read_settings(str(trained), model)
        assert setting.text == "trained"
        stored = features(setting, paths, tmp_path / "features", seed=0, advance=str)
        features_of_weights.append(stored)
    first, second = features_of_weights
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.filterwarnings("ignore:An input array is constant")  # two settings of one score
def test_the_results_of_a_setting_are_paired_with_dense(folder, model, results):
    document = results("--own", "--settings", "tome 0.5, resize 0.5, random 0.3")
    assert document["split"] == "validation"
    assert document["photographs"]["clothes"]["measured"] == 2 * SPLITS["validation"]
    tome, _, random = document["settings"]
    assert 0.4 < tome["flops"] < 0.6 and random["cosine"]["mean"] < tome["cosine"]["mean"] < 1
    assert set(tome["difference"]) == {*tasks.TASKS, tasks.OWN}
    for name, difference in tome["difference"].items():
        gap = tome[name]["mean"] - document["dense"][name]["mean"]
        assert difference["mean"] == pytest.approx(gap, abs=2e-5)
        assert difference["low"] <= difference["mean"] <= difference["high"]
    tested = results("--test", "--settings", "tome 0.5, resize 0.5")
    assert tested["split"] == "test" and "top1_own" not in tested["dense"]
    assert tested["rank_correlation"] == {}


def test_intervals_are_of_the_differences_by_image():
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(50, generator=generator) < 0.7).double()
    reduced = (torch.rand(50, generator=generator) < 0.6).double()
    found = tasks.means({"top1": reduced - dense})["top1"]
    expected = bootstrap_interval((reduced - dense).numpy())._asdict()
    assert found == pytest.approx(expected, abs=1e-5)


def test_cosine_may_order_settings_as_a_task_does_or_not():
    rising = [{"mean": value} for value in (0.1, 0.2, 0.3)]
    entries = [
        dict.fromkeys((*tasks.TASKS, "neighbours"), value) | {"cosine": other}
        for value, other in zip(rising, reversed(rising), strict=True)
    ]
    found = tasks.correlations(entries)
    assert found["cosine"] == dict.fromkeys(tasks.TASKS, -1.0)
    assert found["neighbours"] == dict.fromkeys(tasks.TASKS, 1.0)


def test_times_are_added_to_results(results):
    before = results("--settings", "tome 0.5, resize 0.5")
    document = results("--time", "--rounds", 2)
    added = document.pop("time")
    assert document == before
    runs = [(run["threads"], run["batch"]) for run in added["runs"]]
    assert runs == [(1, 1), (1, 8), (2, 1), (2, 8)]
    for run in added["runs"]:
        assert list(run["ratios"]) == ["dense", "tome 0.5", "resize 0.5"]
        assert run["ratios"]["dense"] == 1 and min(run["milliseconds"].values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "tome 0.5, tome 0.5"], "expected different names, got 'tome 0.5' twice"),
        (["--time"], "time: expected --output"),
    ],
)
def test_wrong_arguments_are_refused(folder, model, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)
    with pytest.raises(SystemExit, match="2"):
        tasks.main([str(folder), *arguments])
    assert message in capsys.readouterr().err


@needs_weights
def test_the_weights_give_the_features_of_the_file(tmp_path):
    """The largest error over the largest feature is of the rounding of two fp32 programs."""
    images = torch.randn(2, 3, dinov2.PIXELS, dinov2.PIXELS)
    expected = dinov2.onnx_features(images)
    dinov2.save(tmp_path)
    saved = open_model(f"timm:local-dir:{tmp_path}").eval()
    for model in (dinov2.timm_model(), saved):
        with torch.no_grad():
            error = (model.forward_features(images) - expected).abs().max()
        assert error < 5e-5 * expected.abs().max()


@needs_weights
def test_the_picture_counts_the_tokens_of_a_photograph(tmp_path):
    from benchmarks.real import picture

    pictures, texts = picture.panels(picture.PHOTOGRAPHS[0])
    assert len(pictures) == len(picture.LAYERS) and texts[0] == "256 tokens"
    counts = [int(text.removesuffix(" tokens")) for text in texts]
    assert counts == sorted(counts, reverse=True) and len({*counts}) == len(counts)
    picture.main([str(tmp_path / "out.jpg"), "--photographs", str(picture.PHOTOGRAPHS[0])])
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.format == "JPEG" and image.width > 2 * image.height  # four panels
