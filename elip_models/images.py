"""Images: the statistics that they are normalised by, and the decoding of files."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from elip_models.validation import require_extra

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Stats = tuple[Sequence[float], Sequence[float]]
"""The mean and standard deviation of each colour channel that images are normalised by."""
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_STATS: Stats = (CLIP_MEAN, CLIP_STD)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Raster formats that are decoded, whatever the file extension; none runs another program."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

MAX_PIXELS = 64_000_000  # 256 MB as RGBA
MAX_ASPECT = 64  # long side over short side; resizing the short side would make the image huge
MAX_IMAGE_BYTES = 2**28
MAX_SCANS = 100  # of a JPEG; a progressive one of Pillow has 10, and each decodes all pixels again
MAX_SCAN_PIXELS = 16 * MAX_PIXELS  # of all scans; about 5 s

# A marker with a length, or the end of the image; others are in scans, or have no length.
_JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA


class SampleError(Exception):
    """Raised when one sample cannot be read. Other samples are not affected.

    Attributes:
        id: Id of the sample.
        reason: Why it cannot be read.
    """

    def __init__(self, id: str, reason: str) -> None:
        # A path that is not UTF-8 has surrogates, which cannot be printed.
        id, reason = (text.encode(errors="backslashreplace").decode() for text in (id, reason))
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


def pixels_of(image: "Image.Image", size: tuple[int, int]) -> "Tensor":
    """Crop an RGB image at the centre to the shape (H, W), resized: (3, H, W) in [0, 1]."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    fitted = ImageOps.fit(image, size[::-1], method=Image.Resampling.BICUBIC)
    return pil_to_tensor(fitted).float() / 255


def decode_image(file: BinaryIO | Path, sample_id: str) -> "Image.Image":
    """Decode an image to RGB.

    Transparency is composited on white. Of 16-bit channels, the upper 8 bits are kept.

    Raises:
        SampleError: The file is missing or damaged, not one of `FORMATS`, has 32 bits per channel,
            or exceeds one of the limits above. Its id is `sample_id`.
    """
    with open_image_file(file, sample_id) as image:
        _check_scans(image)
        image.load()
        return _to_rgb(image)


def decode_clip(path: Path, count: int) -> "list[Image.Image]":
    """Decode `count` evenly spaced frames of a folder of images, by name, or of an animated image.

    Raises:
        SampleError: A frame cannot be read, see `decode_image`, or there are fewer.
    """
    if os.path.isdir(path):  # false if the path is too long or has a null character
        try:
            files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        except OSError as error:
            raise SampleError(str(path), f"not a readable folder: {error}") from error
        return [decode_image(files[i], str(files[i])) for i in _spaced(len(files), count, path)]
    frames = []
    with open_image_file(path, str(path)) as image:
        for i in _spaced(getattr(image, "n_frames", 1), count, path):
            image.seek(i)
            frames.append(_to_rgb(image))
    return frames


def _spaced(available: int, count: int, path: Path) -> list[int]:
    """Return the indices of `count` evenly spaced frames, the first and the last included."""
    if available < count:
        raise SampleError(str(path), f"expected at least {count} frames, got {available}")
    return [round(i * (available - 1) / max(count - 1, 1)) for i in range(count)]


@contextmanager
def open_image_file(file: BinaryIO | Path, sample_id: str) -> "Iterator[Image.Image]":
    """Open an image and read its header; errors inside the context become SampleError."""
    with require_extra("decode_image"):
        from PIL import Image, UnidentifiedImageError
    if isinstance(file, Path) and (problem := _file_problem(file)):
        raise SampleError(sample_id, f"{problem}: {file}")
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size)
            yield image
    except SampleError:
        raise
    except UnidentifiedImageError as error:  # its text has the address of the file object
        raise SampleError(sample_id, "not a readable image: cannot identify its format") from error
    except Exception as error:  # decoders raise whatever they meet in damaged bytes
        reason = str(error) or type(error).__name__
        raise SampleError(sample_id, f"not a readable image: {reason}") from error


def _file_problem(path: Path) -> str:
    """Return why a path cannot be an image, or ""."""
    if not os.path.isfile(path):  # also false if the path is too long or has a null character
        return "not a file" if os.path.exists(path) else "no such file"
    if (size := os.path.getsize(path)) > MAX_IMAGE_BYTES:
        return f"expected at most {MAX_IMAGE_BYTES} bytes, got {size}"
    return ""


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if width * height > MAX_PIXELS or long > MAX_ASPECT * max(short, 1):
        raise ValueError(
            f"expected at most {MAX_PIXELS} pixels and sides of at most {MAX_ASPECT}:1, got "
            f"{width} x {height}"
        )


def _check_scans(image: "Image.Image") -> None:
    """Raise ValueError if a JPEG has so many scans that decoding takes minutes."""
    if image.format not in ("JPEG", "MPO"):
        return
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    scans = _count_scans(content)
    if scans > MAX_SCANS or scans * image.width * image.height > MAX_SCAN_PIXELS:
        raise ValueError(
            f"expected at most {MAX_SCANS} scans, of {MAX_SCAN_PIXELS} pixels in all, got {scans} "
            f"of {image.width} x {image.height}"
        )


def _count_scans(jpeg: bytes) -> int:
    scans, at = 0, 0
    while segment := _JPEG_SEGMENT.search(jpeg, at):
        marker, at = segment.group()[1], segment.end()
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        at += int.from_bytes(jpeg[at : at + 2])
    return scans


def _to_rgb(image: "Image.Image") -> "Image.Image":
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow's convert would clip values above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits per channel, got Pillow's mode {image.mode!r}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", layer.size, "white")
    canvas.paste(layer, mask=layer)
    return canvas
