"""Measures on real features, photographs of a folder, and DINOv2 out of its ONNX file."""

import pytest
import torch
from PIL import Image

from benchmarks.real.measures import finds_itself, patch_cosine
from benchmarks.real.photographs import batches, photograph_paths
from elip_models.analysis.feature_measures import NEIGHBOURS, cosine, neighbours
from elip_models.saving.open_model import open_model
from tests.benchmarks.weights import needs_weights

N = 30


def test_equal_features_have_the_best_value_of_each_measure():
    dense = torch.randn(N, 8)
    for measure in (cosine, neighbours, finds_itself):
        torch.testing.assert_close(measure(dense, 3 * dense), torch.ones(N))
    patches = torch.randn(N, 5, 8)
    torch.testing.assert_close(patch_cosine(patches, 3 * patches), torch.ones(N))


def test_neighbours_are_counted_against_a_plain_form():
    dense, reduced = torch.randn(N, 8), torch.randn(N, 8)

    def nearest(features, i):
        unit = features / features.norm(dim=1, keepdim=True)
        order = sorted(range(N), key=lambda j: -float(unit[i] @ unit[j]))
        return set([j for j in order if j != i][:NEIGHBOURS])

    shares = [len(nearest(dense, i) & nearest(reduced, i)) / NEIGHBOURS for i in range(N)]
    torch.testing.assert_close(neighbours(dense, reduced), torch.tensor(shares))
    assert 0 < sum(shares) / N < 1


def test_an_image_that_looks_like_another_does_not_find_itself():
    dense = torch.eye(N)
    assert finds_itself(dense, dense.roll(1, 0)).sum() == 0


def test_too_few_images_have_no_neighbours():
    with pytest.raises(ValueError, match=r"images: expected more than 10, .* got 10"):
        neighbours(torch.randn(10, 4), torch.randn(10, 4))


def test_photographs_come_in_the_order_of_their_list(tmp_path):
    for i, name in enumerate(("b.jpg", "a.jpg", "c.png")):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "names.txt").write_text("c.png\nabsent.jpg\nb.jpg\n")
    assert [path.name for path in photograph_paths(tmp_path)] == ["a.jpg", "b.jpg", "c.png"]
    listed = photograph_paths(tmp_path, tmp_path / "names.txt")
    assert [path.name for path in listed] == ["c.png", "b.jpg"]
    (images,) = batches(listed, pixels=28)
    assert images.shape == (2, 3, 28, 28) and images[0].mean() > images[1].mean()


def test_a_folder_without_photographs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected photographs, got none in"):
        photograph_paths(tmp_path)


@needs_weights
def test_the_weights_give_the_features_of_the_file(tmp_path):
    """The largest error over the largest feature is of the rounding of two fp32 programs."""
    from benchmarks.real import dinov2

    images = torch.randn(2, 3, dinov2.PIXELS, dinov2.PIXELS)
    expected = dinov2.onnx_features(images)
    dinov2.save(tmp_path)
    with torch.no_grad():
        found = {
            "timm": dinov2.timm_model().forward_features(images),
            "saved": open_model(f"timm:local-dir:{tmp_path}").eval().forward_features(images),
            "transformers": dinov2.transformers_model()(images).last_hidden_state,
        }
    for features in found.values():
        assert (features - expected).abs().max() < 5e-5 * expected.abs().max()
