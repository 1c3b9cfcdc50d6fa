"""Example sources made from other sources: concatenation, and images with classes."""

from collections.abc import Sequence
from itertools import accumulate

from elip_models.data.checks import check_index
from elip_models.data.class_sources import ClassSource
from elip_models.data.examples import Example, ExampleSource
from elip_models.data.sample import SampleError


class ConcatExamples:
    """Concatenation of several sources, as one `ExampleSource`.

    The id of an example starts with the number of its source: "1/262148000". `answers` has the
    answers of the first source, then further answers of the others.
    """

    def __init__(self, sources: Sequence[ExampleSource]) -> None:
        self.sources = tuple(sources)
        self._ends = list(accumulate(map(len, self.sources)))
        self.answers = tuple(dict.fromkeys(each for one in self.sources for each in one.answers))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        number, place = self._find(index)
        try:
            example = self.sources[number][place]
        except SampleError as error:
            raise SampleError(f"{number}/{error.id}", error.reason) from error
        return example._replace(id=f"{number}/{example.id}")

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        number, place = self._find(index)
        example = self.sources[number].text_alone(place)
        return example._replace(id=f"{number}/{example.id}")

    def _find(self, index: int) -> tuple[int, int]:
        """Return the number of the source and the index in it."""
        check_index(index, len(self))
        number = next(i for i, end in enumerate(self._ends) if index < end)
        return number, index - self._ends[number] + len(self.sources[number])


class ClassExamples:
    """An `ExampleSource` of images with classes and without text.

    The classes are its `answers`, in the order of the source.
    """

    def __init__(self, source: ClassSource) -> None:
        self.source = source
        self.answers = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.text_alone(index)._replace(images=(self.source[index].image,))

    def text_alone(self, index: int) -> Example:
        """Return the class without decoding the image."""
        (name,) = self.source.captions(index)
        return Example((), "", {name: 1.0}, self.source.sample_id(index))
