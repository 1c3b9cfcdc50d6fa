"""Samples, examples of downstream tasks, and the protocols of their sources."""

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


class Example(NamedTuple):
    """One question, statement or class label, with its images.

    Attributes:
        images: RGB images, one or two.
        text: Question, hypothesis or statement; "" for a task without text.
        answers: Correct answers with their weights in the losses of ALBEF and BLIP. For VQA, the
            weight is the share of people who gave the answer: {"yes": 0.9, "no": 0.1}. For a class,
            it is 1.0. Empty if the answer is unknown.
        id: Id of the example.
    """

    images: tuple[Image.Image, ...]
    text: str
    answers: dict[str, float]
    id: str


class ExampleSource(Protocol):
    """Map-style collection of examples. An index outside [0, len) raises IndexError.

    Attributes:
        answers: All possible answers, in the order of a classifier's outputs.
    """

    answers: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Read and decode one example. Raises SampleError if it cannot be read."""

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""


@runtime_checkable
class NamedMasks(Protocol):
    """Optional part of a `Source`: masks of the objects that captions name."""

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """Return (H, W) bool: the pixels that show what caption number `caption` names."""


@runtime_checkable
class SharedImages(Protocol):
    """Optional part of a `Source` or `ExampleSource`: the samples that show the same image."""

    def image_number(self, index: int) -> int:
        """Return the first index that shows the same image as `index`."""


def image_number(source: Source | ExampleSource, index: int) -> int:
    """Return `source.image_number(index)`, or `index` if the source does not share images."""
    return source.image_number(index) if isinstance(source, SharedImages) else index


def clean_captions(value: Any) -> list[str]:
    """Return the non-empty captions of a text, a list of texts or None, white space collapsed.

    Raises ValueError if `value` has another type.
    """
    captions = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"caption: expected a text or a list of texts, got {shortened(value)}")
    return [collapsed for text in captions if (collapsed := " ".join(text.split()))]


def check_index(index: int, length: int) -> None:
    """Raise IndexError unless 0 <= index < length, so that a `for` over a source ends."""
    if not 0 <= index < length:
        raise IndexError(f"index: expected 0 <= index < {length}, got {index}")
