"""What a downstream task asks of images: `Example`, and the protocol of a collection of them."""

from typing import NamedTuple, Protocol

from PIL import Image


class Example(NamedTuple):
    """One question about one image, or about two.

    images: RGB, as many as the task shows. text: a question, a hypothesis or a statement; '' where
    the task has none. answers: the right ones, each with the share of people who gave it, {"yes":
    0.9, "no": 0.1}, which is what it weighs in ALBEF's and BLIP's losses, and of which
    `soft_scores` makes what it scores; of a class, {"entailment": 1.0}; {} where nobody knows.
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


def soft_scores(answers: dict[str, float]) -> dict[str, float]:
    """Shares -> what the metric of VQA gives for each answer: min(1, 3 x share), so that of ten
    people one makes 0.3, two 0.6, three 0.9, and four all of it.

    They are METER's targets, and the mean of min(1, n / 3) over any nine of the ten.
    """
    return {answer: min(1.0, round(3 * share, 6)) for answer, share in answers.items()}
