"""What every source of data gives: `Sample`, the `Source` protocol, and how raw bytes become it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened, whatever a file is called: raster formats, none of which runs another program."""

MAX_PIXELS = 64_000_000  # 256 MB as RGBA
MAX_ASPECT = 64  # the long side over the short one: resizing makes the short one as long as asked


class Sample(NamedTuple):
    """One image with its captions. `image` is RGB, `captions` holds at least one non-empty text."""

    image: Image.Image
    captions: tuple[str, ...]
    id: str


class SampleError(Exception):
    """One sample cannot be read. `id` says which, `reason` why; the others are not affected."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class Source(Protocol):
    """A map-style collection of samples. An index outside [0, len) is an IndexError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read and decode one sample; SampleError if that sample cannot be read."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions alone, no image decoded. Empty where the sample has none."""
        ...


@runtime_checkable
class NamedMasks(Protocol):
    """What a `Source` may also give: where in its images the things are that captions name."""

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """(H, W) bool over the stored image: the pixels that show what a caption, by its number
        among those of the sample, names.
        """
        ...


def clean_captions(value: Any) -> list[str]:
    """A caption, a list of captions or None -> those with text, white space collapsed.

    Raises ValueError where `value` is anything else.
    """
    captions = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"caption: expected a text or a list of texts, got {value!r}")
    collapsed = (" ".join(text.split()) for text in captions)
    return [text for text in collapsed if text]


class TextError(ValueError):
    """A text that is none: it holds half of a surrogate pair, as JSON can and no file of text."""


def check_text(name: str, *texts: str) -> None:
    """Raises TextError."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"{name}: expected Unicode text, got {text!r:.100}") from error


def decode_image(file: BinaryIO | Path, sample_id: str) -> Image.Image:
    """Decode the whole image -> RGB, transparency composited on white, of 16 bits the upper 8.

    Raises SampleError under `sample_id` where the file is missing or damaged, of another format
    than `FORMATS`, of 32 bits a channel, or larger than `MAX_PIXELS` and `MAX_ASPECT` allow.
    """
    with opened_image(file, sample_id) as image:
        image.load()
        return _to_rgb(image)


@contextmanager
def opened_image(file: BinaryIO | Path, sample_id: str) -> Iterator[Image.Image]:
    """The image of a file, its header read; what fails inside is a SampleError, as above."""
    if isinstance(file, Path) and not file.is_file():
        what = "not a file" if file.exists() else "no such file"
        raise SampleError(sample_id, f"{what}: {file}")
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size)
            yield image
    except Exception as error:  # decoders raise whatever they meet in damaged bytes
        reason = str(error) or type(error).__name__
        raise SampleError(sample_id, f"not a readable image: {reason}") from error


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if width * height > MAX_PIXELS or long > MAX_ASPECT * max(short, 1):
        raise ValueError(
            f"expected at most {MAX_PIXELS} pixels and sides of at most {MAX_ASPECT}:1, got "
            f"{width} x {height}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would make white of all above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got Pillow's mode {image.mode!r}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", layer.size, "white")
    canvas.paste(layer, mask=layer)
    return canvas
