"""Decoding of stored images of every mode to RGB."""

import numpy as np
import pytest
from PIL import Image

from elip_models.images import SampleError, decode_image
from tests.pretraining.data.test_data_readers import image_bytes, opened


@pytest.mark.parametrize(
    ("image_format", "mode", "colour", "expected"),
    [
        ("PNG", "RGB", (9, 8, 7), (9, 8, 7)),
        ("PNG", "L", 40, (40, 40, 40)),
        ("PNG", "RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("PNG", "RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("PNG", "LA", (0, 0), (255, 255, 255)),
        ("PNG", "P", 0, (0, 0, 0)),
        ("JPEG", "CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("WEBP", "RGB", (255, 255, 255), (255, 255, 255)),
    ],
)
def test_images_become_rgb_on_white(image_format, mode, colour, expected, tmp_path):
    (tmp_path / "a.img").write_bytes(image_bytes(image_format, mode, colour))
    (tmp_path / "list.json").write_text('[{"image": "a.img", "caption": "a"}]')
    image = opened(tmp_path / "list.json")[0].image
    assert image.mode == "RGB" and image.size == (6, 5)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    Image.new("P", (4, 4), 0).save(tmp_path / "a.png", transparency=0)
    path = tmp_path / "list.json"
    path.write_text('[{"image": "a.png", "caption": "a"}]')
    assert opened(path)[0].image.getpixel((0, 0)) == (255, 255, 255)


def grey_steps(kind: str) -> Image.Image:
    """Return an image with black, a dark grey and white."""
    return Image.fromarray(np.array([[0, 0x2A2B, 0xFFFF]], dtype=kind))


@pytest.mark.parametrize(("suffix", "kind"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
def test_the_upper_eight_of_sixteen_bits_are_kept(suffix, kind, tmp_path):
    grey_steps(kind).save(tmp_path / f"a.{suffix}")
    image = decode_image(tmp_path / f"a.{suffix}", "id")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (42,) * 3, (255,) * 3]


@pytest.mark.parametrize("kind", ["<i4", "<f4"])
def test_32_bit_images_are_refused(kind, tmp_path):
    grey_steps(kind).save(tmp_path / "a.tif")
    with pytest.raises(SampleError, match="expected 8 or 16 bits per channel, got Pillow's mode"):
        decode_image(tmp_path / "a.tif", "id")
