"""What a downstream task asks of images: `Example`, and the protocol of a collection of them."""

from typing import NamedTuple, Protocol

from PIL import Image


class Example(NamedTuple):
    """One question about one image, or about two.

    images: RGB, as many as the task shows. text: a question, a hypothesis or a statement; '' where
    the task has none. answers: the right ones and how much each counts, {"yes": 1.0, "no": 0.3};
    of a class, {"entailment": 1.0}.
    """

    images: tuple[Image.Image, ...]
    text: str
    answers: dict[str, float]
    id: str


class ExampleSource(Protocol):
    """A map-style collection of examples. An index outside [0, len) is an IndexError.

    answers: all that can be answered, in the order of a classifier's outputs.
    """

    answers: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Read and decode one example; SampleError if that example cannot be read."""
        ...

    def text_alone(self, index: int) -> Example:
        """The example with no image, and none decoded."""
        ...
