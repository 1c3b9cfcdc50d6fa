"""Sources with several entries for one image, and their grouping by image."""

from typing import Protocol, runtime_checkable

from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.examples import ExampleSource
from elip_models.pretraining.data.sample import Sample, Source


@runtime_checkable
class SharedImages(Protocol):
    """Optional part of a `Source` or `ExampleSource`: the samples that show the same image."""

    def image_number(self, index: int) -> int:
        """Return the first index that shows the same image as `index`."""


def image_number(source: Source | ExampleSource, index: int) -> int:
    """Return `source.image_number(index)`, or `index` if the source does not share images."""
    return source.image_number(index) if isinstance(source, SharedImages) else index


def group_by_image(source: Source) -> Source:
    """Return the source with one sample per image, which has all captions of that image."""
    entries: dict[int, list[int]] = {}
    for index in range(len(source) if isinstance(source, SharedImages) else 0):
        entries.setdefault(source.image_number(index), []).append(index)
    is_shared = any(len(indices) > 1 for indices in entries.values())
    return _GroupedByImage(source, list(entries.values())) if is_shared else source


class _GroupedByImage:
    """A `Source` with one sample per image; `entries` holds the indices of each image."""

    def __init__(self, source: Source, entries: list[list[int]]) -> None:
        self._source, self._entries = source, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        entries = self._entries[index]
        first = next((entry for entry in entries if self._source.captions(entry)), entries[0])
        return self._source[first]._replace(captions=self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        check_index(index, len(self))
        entries = self._entries[index]
        return tuple(text for entry in entries for text in self._source.captions(entry))
