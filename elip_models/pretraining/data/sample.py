"""The `Sample` type, the `Source` protocol, and the captions of a sample."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from elip_models.validation import shortened


class Sample(NamedTuple):
    """One RGB image with at least one non-empty caption, or none for `needs_captions=False`."""

    image: Image.Image
    captions: tuple[str, ...]
    id: str


class Source(Protocol):
    """Map-style collection of samples. An index outside [0, len) raises IndexError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read and decode one sample. Raises SampleError if it cannot be read."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image; empty if the sample has none."""


@runtime_checkable
class NamedMasks(Protocol):
    """Optional part of a `Source`: masks of the objects that captions name."""

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """Return (H, W) bool: the pixels that show what caption number `caption` names."""


def clean_captions(value: Any) -> list[str]:
    """Return the non-empty captions of a text, a list of texts or None, white space collapsed.

    Raises:
        ValueError: `value` has another type.
    """
    captions = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"caption: expected a text or a list of texts, got {shortened(value)}")
    collapsed = (" ".join(text.split()) for text in captions)
    return [text for text in collapsed if text]
