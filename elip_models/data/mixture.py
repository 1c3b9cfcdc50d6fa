"""Several sources as one, each as often as its weight says.

An epoch has n_i = round(weight_i * length_i) samples of source i, at least one. They are the next
n_i of an endless sequence of passes over the source, so that all its samples come equally often
whatever the weight: each pass is a permutation of (seed, source, pass), and a sample is told in
which pass, its turn, it comes.
"""

from collections.abc import Sequence

import numpy as np

from elip_models.data.checks import check_index
from elip_models.data.sample import Sample, SampleError, Source
from elip_models.data.shared_images import image_number
from elip_models.validation import Positive, check


class MixedSource:
    """A `Source` of all samples of `sources`, one source after the other.

    The id of a sample is that of its source, behind the number of the source: "1/00000.tar:000003".
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.lengths = tuple(len(source) for source in self.sources)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        number, place = self._find(index)
        try:
            sample = self.sources[number][place]
        except SampleError as error:
            raise SampleError(f"{number}/{error.id}", error.reason) from error
        return sample._replace(id=f"{number}/{sample.id}")

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions alone, no image decoded. Empty where the sample has none."""
        number, place = self._find(index)
        return self.sources[number].captions(place)

    def image_number(self, index: int) -> int:
        """The first index at which the image of this one stands, in its source."""
        number, place = self._find(index)
        return index - place + image_number(self.sources[number], place)

    def _find(self, index: int) -> tuple[int, int]:
        """The number of its source, and its index there."""
        check_index(index, len(self))
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self.lengths[number]


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One weight for each of `count` sources; 1 each where there are none."""
    if weights is None:
        return (1.0,) * count
    check("weights", tuple(weights), tuple[Positive, ...])
    if len(weights) != count:
        raise ValueError(f"weights: expected one for each of {count} sources, got {len(weights)}")
    return tuple(weights)


def samples_an_epoch(length: int, weight: float) -> int:
    """How many samples of a source come in an epoch."""
    return max(1, round(weight * length))


def turns(lengths: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch, not yet shuffled -> (n, 2) int64: turn, and index in all sources."""
    parts, first = [], 0
    for number, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        count = samples_an_epoch(length, weight)
        turn, place = np.divmod(np.arange(epoch * count, (epoch + 1) * count), length)
        for each in np.unique(turn):
            of_turn = turn == each
            if of_turn.sum() < length:  # a whole pass is shuffled with the epoch
                order = np.random.default_rng((seed, number, int(each))).permutation(length)
                place[of_turn] = order[place[of_turn]]
        parts.append(np.stack([turn, place + first], axis=1))
        first += length
    return np.concatenate(parts)
