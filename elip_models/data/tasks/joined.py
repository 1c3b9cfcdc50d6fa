"""Sources of examples made of others: several as one, and images of classes."""

from collections.abc import Sequence
from itertools import accumulate

from elip_models.data.checks import check_index
from elip_models.data.classes import ClassSource
from elip_models.data.examples import Example, ExampleSource
from elip_models.data.sample import SampleError


class JoinedExamples:
    """An `ExampleSource` of all examples of `sources`, one source after the other.

    The id of an example is that of its source, behind the number of the source: "1/262148000".
    answers: those of the first source, then what others have beside.
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
        """The example with no image, and none decoded."""
        number, place = self._find(index)
        example = self.sources[number].text_alone(place)
        return example._replace(id=f"{number}/{example.id}")

    def _find(self, index: int) -> tuple[int, int]:
        """The number of its source, and its index there."""
        check_index(index, len(self))
        number = next(i for i, end in enumerate(self._ends) if index < end)
        return number, index - self._ends[number] + len(self.sources[number])


class ClassExamples:
    """An `ExampleSource` of images and their classes, without a text.

    answers: the classes, in the order of the source.
    """

    def __init__(self, source: ClassSource) -> None:
        self.source = source
        self.answers = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.text_alone(index)._replace(images=(self.source[index].image,))

    def text_alone(self, index: int) -> Example:
        """The class alone, no image decoded."""
        (name,) = self.source.captions(index)
        return Example((), "", {name: 1.0}, self.source.sample_id(index))
