"""A baseline for tasks with texts: the accuracy of answers predicted from the text alone."""

from collections import Counter, defaultdict
from collections.abc import Iterator

from elip_models.pretraining.data.checks import check_not_empty
from elip_models.pretraining.data.examples import ExampleSource, soft_scores


def question_only_accuracy(train: ExampleSource, test: ExampleSource) -> float:
    """Return the mean soft score on `test`, in [0, 1], of a baseline that reads no image.

    It predicts the most frequent answer in `train` among the texts with the longest common prefix
    of words. The first of equally frequent answers is used. A task without texts thus gets the
    majority answer.
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
    """Yield all words of the text, all but the last, and so on to none."""
    words = tuple(text.lower().split())
    return (words[:count] for count in range(len(words), -1, -1))
