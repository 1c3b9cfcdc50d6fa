"""`Example`, one item of a downstream task, and the protocol of a collection of them."""

from typing import NamedTuple, Protocol

from PIL import Image
from torch.utils.data import Subset


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


class AnswerableExamples(Subset):
    """The examples of a source that have one of its possible answers.

    Raises:
        ValueError: No example has one.
    """

    def __init__(self, source: ExampleSource) -> None:
        self.answers = source.answers
        listed = set(source.answers)
        answers = (source.text_alone(index).answers for index in range(len(source)))
        super().__init__(source, [i for i, own in enumerate(answers) if own.keys() & listed])
        if not self.indices:
            raise ValueError(
                f"answers: expected one of the {len(listed)} possible ones for some of the "
                f"{len(source)} examples, got none; use another list of answers"
            )

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        return self.dataset.text_alone(self.indices[index])


def soft_scores(answers: dict[str, float]) -> dict[str, float]:
    """Return the VQA score of each answer, min(1, 3 x share).

    Of ten people, one gives 0.3, two 0.6, three 0.9, and four or more 1. This equals the mean of
    min(1, n / 3) over any nine of the ten. METER uses these scores as targets.
    """
    return {answer: min(1.0, round(3 * share, 6)) for answer, share in answers.items()}
