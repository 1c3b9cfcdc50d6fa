"""What every source of data gives: `Sample`, the `Source` protocol, and how raw bytes become it."""

import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

# What Pillow's decoders raise on damaged bytes; UnidentifiedImageError is an OSError.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


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
        among those of the sample, names."""
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


def decode_image(file: BinaryIO | Path, sample_id: str) -> Image.Image:
    """Decode the whole image -> RGB, transparency composited on white.

    Raises SampleError under `sample_id` where the file is missing or damaged.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return _to_rgb(image)
    except FileNotFoundError as error:
        raise SampleError(sample_id, f"no such file: {file}") from error
    except _DAMAGED as error:
        raise SampleError(sample_id, f"not a readable image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", layer.size, "white")
    canvas.paste(layer, mask=layer)
    return canvas
