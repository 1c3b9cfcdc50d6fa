"""Images: every mode is decoded to RGB; damaged and hostile ones are named."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from elip_models.images import MAX_PIXELS, SampleError, decode_image
from tests.helpers.damage import picture


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, colour=2):
    """Return the header of a PNG image of any size, without pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(13_000, 13_000), f"at most {MAX_PIXELS} pixels.*got 13000 x 13000"),
        (png(2_000_000, 1), "at most 64:1, got 2000000 x 1"),
        (png(8, 8, colour=3), "not a readable image"),  # a palette that is not there
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify its format$"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(64), "not a readable image"),
        (b"DDS |\x00\x00\x00" + bytes(120), "not a readable image"),
        (b"BLP2" + bytes(200), "not a readable image"),
        (b"", "not a readable image"),
    ],
)
def test_an_unsupported_image_is_a_sample_error(content, reason):
    with pytest.raises(SampleError, match=reason):
        decode_image(io.BytesIO(content), "id")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:PIL", "ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_damaged_image_is_read_or_a_sample_error(format):
    content, random = picture(3, format), np.random.default_rng(0)
    assert decode_image(io.BytesIO(content), "id").size == (12, 10)
    for _ in range(40):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), 3):
            damaged[at] = random.integers(256)
        try:
            assert decode_image(io.BytesIO(bytes(damaged)), "id").mode == "RGB"
        except SampleError as error:
            assert error.reason.startswith("not a readable image: ")


def many_scans(count, size=(64, 64)):
    """Return a progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + content[-2:]


@pytest.mark.parametrize(
    ("count", "size", "reason"),
    [
        (6000, (64, 64), "at most 100 scans.*got 6010 of 64 x 64"),
        (40, (8000, 4000), "of 1024000000 pixels in all, got 50 of 8000 x 4000"),
    ],
)
def test_a_jpeg_of_many_scans_is_not_decoded(count, size, reason, monkeypatch):
    content = many_scans(count, size)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(SampleError, match=reason):
        decode_image(io.BytesIO(content), "id")


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
    Image.new(mode, (6, 5), colour).save(tmp_path / "a.img", image_format)
    image = decode_image(tmp_path / "a.img", "id")
    assert image.mode == "RGB" and image.size == (6, 5)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


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
