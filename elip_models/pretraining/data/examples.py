"""`Example`, one item of a downstream task, and the protocol of a collection of them."""

from typing import NamedTuple, Protocol

from PIL import Image


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


class AnswerableExamples:
    """The examples of a source that have one of its possible answers.

    Raises:
        ValueError: No example has one.
    """

    def __init__(self, source: ExampleSource) -> None:
        self.source, self.answers = source, source.answers
        listed = set(source.answers)
        examples = enumerate(map(source.text_alone, range(len(source))))
        self._indices = [i for i, example in examples if example.answers.keys() & listed]
        if not self._indices:
            raise ValueError(
                f"answers: expected one of the {len(listed)} possible ones for some of the "
                f"{len(source)} examples, got none; use another list of answers"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self._indices[index]]

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        return self.source.text_alone(self._indices[index])


def soft_scores(answers: dict[str, float]) -> dict[str, float]:
    """Return the VQA score of each answer, min(1, 3 x share).

    Of ten people, one gives 0.3, two 0.6, three 0.9, and four or more 1. This equals the mean of
    min(1, n / 3) over any nine of the ten. METER uses these scores as targets.
    """
    return {answer: min(1.0, round(3 * share, 6)) for answer, share in answers.items()}
