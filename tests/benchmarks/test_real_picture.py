"""The picture of what ToMe merges in DINOv2 on a photograph."""

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.weights import needs_weights


@pytest.fixture
def photograph(tmp_path):
    """A photograph of noise on the left, and one colour on the right."""
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    pixels[:, 112:] = (10, 200, 90)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@needs_weights
def test_titles_count_the_tokens_and_merged_patches_have_one_colour(photograph):
    from benchmarks.real import picture

    found = picture.panels(photograph, [1, 12])
    first, early, late = found
    assert first == "photograph:\n256 tokens"
    counts = [int(title.split()[-2]) for title in (early, late)]
    assert 256 > counts[0] > counts[1] > 1 and early.startswith("after layer 1 of 12:")
    plain, _, merged = found.values()
    assert plain.shape == merged.shape == (3, picture.SHOWN, picture.SHOWN)
    shown = [len(each.flatten(1).unique(dim=1)[0]) for each in (plain, merged)]
    assert shown[1] < shown[0] / 10
    with pytest.raises(ValueError, match="layers: expected some of 1 to 12, got 13"):
        picture.panels(photograph, [13])


@needs_weights
def test_the_command_writes_a_png(photograph, tmp_path):
    from benchmarks.real import picture

    path = tmp_path / "out.png"
    picture.main([str(path), "--photograph", str(photograph), "--layers", "12"])
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1.5 * image.height


def test_the_default_photograph_is_there():
    from benchmarks.real import picture

    with Image.open(picture.default_photograph()) as image:
        assert image.size == (640, 427)
