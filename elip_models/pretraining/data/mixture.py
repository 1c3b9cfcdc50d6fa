"""Several sources as one, with a weight for each.

An epoch has n_i = max(1, round(weight_i * length_i)) samples of source i. They are the next n_i
samples of an endless sequence of passes over source i. All samples of a source thus appear equally
often for any weight. Each pass is a permutation that depends on (seed, source, pass). The number of
the pass is called the turn of a sample.
"""

from collections.abc import Sequence

import numpy as np

from elip_models.images import SampleError
from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.examples import Example, ExampleSource
from elip_models.pretraining.data.sample import Sample, Source
from elip_models.pretraining.data.shared_images import image_number
from elip_models.validation import Positive, check


class Concatenation:
    """Concatenation of several sources; ids start with the source's number: "1/s.tar:003"."""

    def __init__(self, sources: Sequence[Source | ExampleSource]) -> None:
        self.sources = tuple(sources)
        self.lengths = tuple(len(source) for source in self.sources)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample | Example:
        number, place = self._locate(index)
        try:
            sample = self.sources[number][place]
        except SampleError as error:
            raise SampleError(f"{number}/{error.id}", error.reason) from error
        return sample._replace(id=f"{number}/{sample.id}")

    def image_number(self, index: int) -> int:
        """Return the first index that shows the same image, within the same source."""
        number, place = self._locate(index)
        return index - place + image_number(self.sources[number], place)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of the source and the index in it."""
        check_index(index, len(self))
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self.lengths[number]


class MixedSource(Concatenation):
    """Concatenation of image-caption sources, as one `Source`."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image; empty if the sample has none."""
        number, place = self._locate(index)
        return self.sources[number].captions(place)


class ConcatExamples(Concatenation):
    """Concatenation of the examples of a task; `answers` has those of the first source first."""

    def __init__(self, sources: Sequence[ExampleSource]) -> None:
        super().__init__(sources)
        self.answers = tuple(
            dict.fromkeys(answer for source in self.sources for answer in source.answers)
        )

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        number, place = self._locate(index)
        example = self.sources[number].text_alone(place)
        return example._replace(id=f"{number}/{example.id}")


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return one weight for each of `count` sources; None gives 1.0 for each."""
    if weights is None:
        return (1.0,) * count
    check("weights", tuple(weights), tuple[Positive, ...])
    if len(weights) != count:
        raise ValueError(f"weights: expected one for each of {count} sources, got {len(weights)}")
    return tuple(weights)


def samples_per_epoch(length: int, weight: float) -> int:
    """Return how many samples of a source one epoch has."""
    return max(1, round(weight * length))


def epoch_positions(
    lengths: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> np.ndarray:
    """Return the samples of an epoch in order: (n, 2) int64 of (turn, index in all sources)."""
    parts, first = [], 0
    for number, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        count = samples_per_epoch(length, weight)
        turns, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), length)
        for turn in np.unique(turns):
            is_turn = turns == turn
            if is_turn.sum() < length:  # a whole pass is shuffled with the epoch
                order = np.random.default_rng((seed, number, int(turn))).permutation(length)
                places[is_turn] = order[places[is_turn]]
        parts.append(np.stack([turns, places + first], axis=1))
        first += length
    return np.concatenate(parts)
