"""Examples stored in files: a table, and images that are read on access."""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from elip_models.images import decode_image
from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.examples import Example
from elip_models.validation import TextError, check_text, require_extra

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".jpg", ".png")


class StoredExample(NamedTuple):
    """An `Example` whose images have not been read."""

    entry: str  # place in its file, such as "train.json[3]"
    id: str
    text: str
    answers: dict[str, float]
    images: tuple[Path, ...]  # a path without suffix is a .jpg or a .png file


class FileExamples:
    """An `ExampleSource` over stored examples, with `answers`, all possible answers.

    A missing or damaged image raises SampleError for that example only.
    """

    def __init__(self, rows: Iterable[StoredExample], answers: tuple[str, ...]) -> None:
        self._index = _build_index(rows)
        self.answers = answers

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        row = self._index[index]
        paths = [existing_image(Path(image)) for image in row["images"]]
        images = tuple(decode_image(path, f"{row['entry']} {path.name}") for path in paths)
        return _example(row)._replace(images=images)

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        check_index(index, len(self))
        return _example(self._index[index])

    def image_number(self, index: int) -> int:
        """Return the first index with the same images."""
        return self._image_numbers[index]

    @cached_property
    def _image_numbers(self) -> list[int]:
        first: dict[tuple[str, ...], int] = {}
        return [first.setdefault(tuple(each), i) for i, each in enumerate(self._index["images"])]


def existing_image(path: Path) -> Path:
    """Return the path, with .jpg or .png if it has no suffix, whichever file exists."""
    if path.suffix or not path.name:  # of the root folder
        return path
    named = [path.with_name(path.name + suffix) for suffix in _SUFFIXES]
    return next((each for each in named if os.path.isfile(each)), named[0])


def _example(row: dict) -> Example:
    answers = dict(zip(row["answers"], row["shares"], strict=True))
    return Example((), row["text"], answers, row["id"])


def _build_index(rows: Iterable[StoredExample]) -> "Dataset":
    with require_extra("FileExamples"):
        from datasets import Dataset, Features, Value

    text, names = Value("string"), ("entry", "id", "text", "answers", "shares", "images")
    kinds = {"answers": [text], "shares": [Value("float64")], "images": [text]}
    columns = {name: [] for name in names}
    for entry, row_id, question, answers, images in rows:
        try:
            check_text("text", entry, row_id, question, *answers, *map(str, images))
        except TextError as error:
            raise ValueError(f"{ascii(entry)[1:-1]}: {error}") from error
        values = (entry, row_id, question, list(answers), list(answers.values()))
        for name, value in zip(names, (*values, [str(image) for image in images]), strict=True):
            columns[name].append(value)
    features = Features({name: kinds.get(name, text) for name in names})
    return Dataset.from_dict(columns, features=features)
