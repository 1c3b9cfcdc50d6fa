"""Sources made of others: several as one, one sample per image, examples that have an answer."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Subset

from elip_models.images import SampleError
from elip_models.pretraining.data.samples import (
    Example,
    ExampleSource,
    Sample,
    SharedImages,
    Source,
    check_index,
    image_number,
)


class Concatenation:
    """Concatenation of several sources; ids start with the source's number: "1/s.tar:003"."""

    def __init__(self, sources: Sequence[Source | ExampleSource]) -> None:
        self.sources = tuple(sources)
        self.lengths = tuple(len(source) for source in self.sources)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return sum(self.lengths)

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
        answers = (answer for source in sources for answer in source.answers)
        self.answers = tuple(dict.fromkeys(answers))

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        number, place = self._locate(index)
        example = self.sources[number].text_alone(place)
        return example._replace(id=f"{number}/{example.id}")


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


def group_by_image(source: Source) -> Source:
    """Return the source with one sample per image, which has all captions of that image."""
    if not isinstance(source, SharedImages):
        return source
    entries: dict[int, list[int]] = {}
    for index in range(len(source)):
        entries.setdefault(source.image_number(index), []).append(index)
    return _GroupedByImage(source, list(entries.values())) if len(entries) < len(source) else source


class _GroupedByImage:
    """A `Source` with one sample per image; `entries` holds the indices of each image."""

    def __init__(self, source: Source, entries: list[list[int]]) -> None:
        self._source, self._entries = source, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        captions, entries = self.captions(index), self._entries[index]
        first = next((entry for entry in entries if self._source.captions(entry)), entries[0])
        return self._source[first]._replace(captions=captions)

    def captions(self, index: int) -> tuple[str, ...]:
        check_index(index, len(self))
        entries = self._entries[index]
        return tuple(text for entry in entries for text in self._source.captions(entry))
