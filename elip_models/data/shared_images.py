"""Lists with an entry a pair of image and caption: which entries show one image, and all of them as
one sample where images rank against one another.
"""

from typing import Protocol, runtime_checkable

from elip_models.data.checks import check_index
from elip_models.data.sample import Sample, Source


@runtime_checkable
class SharedImages(Protocol):
    """What a `Source` may also give: which of its samples show the same image."""

    def image_number(self, index: int) -> int:
        """The first index at which the image of this one stands."""
        ...


def image_number(source: Source, index: int) -> int:
    """As of `SharedImages`; of another source each sample has an image of its own."""
    return source.image_number(index) if isinstance(source, SharedImages) else index


def by_image(source: Source) -> Source:
    """The source with one sample an image, which has the captions of all that show it."""
    entries: dict[int, list[int]] = {}
    for index in range(len(source) if isinstance(source, SharedImages) else 0):
        entries.setdefault(source.image_number(index), []).append(index)
    is_shared = any(len(each) > 1 for each in entries.values())
    return _ByImage(source, list(entries.values())) if is_shared else source


class _ByImage:
    """entries: of each image, its indexes in `source`."""

    def __init__(self, source: Source, entries: list[list[int]]) -> None:
        self._source, self._entries = source, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        entries = self._entries[index]
        first = next((each for each in entries if self._source.captions(each)), entries[0])
        return self._source[first]._replace(captions=self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions alone, no image decoded. Empty where the image has none."""
        check_index(index, len(self))
        return tuple(text for each in self._entries[index] for text in self._source.captions(each))
