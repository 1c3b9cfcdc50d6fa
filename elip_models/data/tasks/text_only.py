"""What a text alone gives away of its answer: the baseline that looks at no image."""

from collections import Counter, defaultdict
from collections.abc import Iterator

from elip_models.data.checks import check_not_empty
from elip_models.data.examples import ExampleSource, soft_scores


def question_only_accuracy(train: ExampleSource, test: ExampleSource) -> float:
    """The mean soft score on `test`, in [0, 1], of the answer that is most frequent in `train`
    among the texts that begin with as many of the same words as any do; no image is read.

    A text of `train` itself thus gets its own most frequent answer, another one that of its kind,
    and a task without texts that of the majority. Of equally frequent ones the first counts.
    """
    check_not_empty("train", train)
    check_not_empty("test", test)
    found: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for index in range(len(train)):
        example = train.text_alone(index)
        for words in _beginnings(example.text):
            found[words].update(example.answers)
    total = 0.0
    for index in range(len(test)):
        example = test.text_alone(index)
        words = next(each for each in _beginnings(example.text) if each in found)
        guess = max(found[words], key=found[words].get, default="")
        total += soft_scores(example.answers).get(guess, 0.0)
    return total / len(test)


def _beginnings(text: str) -> Iterator[tuple[str, ...]]:
    """All of its words, all but the last, .., none."""
    words = tuple(text.lower().split())
    return (words[:count] for count in range(len(words), -1, -1))
