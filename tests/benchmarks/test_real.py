"""`python -m benchmarks.real.tasks`: materials, measures, features and intervals."""

import pytest
import torch

from benchmarks.real import dinov2, materials, measures, tasks
from benchmarks.real.features import features, read_settings
from elip_models.intervals import bootstrap_interval
from tests.benchmarks.conftest import CAPTIONED


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


def test_intervals_are_of_the_differences_by_image():
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(50, generator=generator) < 0.7).double()
    reduced = (torch.rand(50, generator=generator) < 0.6).double()
    found = tasks.means({"top1": reduced - dense})["top1"]
    expected = bootstrap_interval((reduced - dense).numpy())._asdict()
    assert found == pytest.approx(expected, abs=1e-5)
