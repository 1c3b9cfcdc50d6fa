"""Rows of the files that authors publish, and a source whose images are read on access.

`FileRow` names the fields of all formats; the sources of captions and of the tasks show the files.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset
from PIL import Image
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    FiniteFloat,
    model_validator,
)

from elip_models.images import decode_image
from elip_models.pretraining.data.data_spec import expand_user
from elip_models.pretraining.data.json_files import validate
from elip_models.pretraining.data.samples import check_index
from elip_models.validation import shortened


def _encodable(text: str) -> str:
    text.encode()  # an error of this is a ValueError, to which pydantic adds the place
    return text


def _texts(value: Any) -> Any:
    """Return a text as a list, and the texts of lists of {"raw"} (Karpathy) or {"answer"} (VQA)."""
    if isinstance(value, list):
        texts = (text if isinstance(text, dict) else {"raw": text} for text in value)
        return [text.get("raw", text.get("answer")) for text in texts]
    return [] if value is None else [str(value) if isinstance(value, bool) else value]


Text = Annotated[str, AfterValidator(_encodable)]
"""A text without unpaired surrogates, which JSON can hold and Arrow cannot."""
Id = Annotated[str, Field(coerce_numbers_to_str=True), AfterValidator(_encodable)]
Texts = Annotated[list[Text], BeforeValidator(_texts)]
Box = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


def _named(default: Any, *names: str) -> Any:
    return Field(default, validation_alias=AliasChoices(*names))


class FileRow(BaseModel):
    """A row of a file; each field lists its names in the formats."""

    images: Texts = _named(
        *([], "images", "image", "filename", "file_name"),
        *("Flickr30K_ID", "Flikr30kID"),  # of SNLI-VE, and of its files of 2018
    )
    folder: Id = _named("", "filepath", "directory")
    texts: Texts = _named([], "caption", "sentences", "question", "sentence2", "sentence")
    answers: Texts = _named([], "answer", "answers", "gold_label", "label")
    first_answer: Text = _named("", "multiple_choice_answer")
    id: Id = _named("", "question_id", "pairID", "identifier", "image_id", "cocoid", "imgid", "id")
    image_id: Id = ""
    split: Text = ""
    domain: Text = ""
    boxes: list[list[Box]] = []

    @model_validator(mode="before")
    @classmethod
    def _add_images_of_nlvr2(cls, row: dict[str, Any]) -> dict[str, Any]:
        if "identifier" not in row:
            return row
        pair = str(row["identifier"]).rpartition("-")[0]
        return row | {"images": [f"{pair}-img0.png", f"{pair}-img1.png"]}

    def paths(self) -> list[str]:
        """Return the paths of the images below the folder of images."""
        return [f"{self.folder}/{image}" if self.folder else image for image in self.images]


def read_rows(
    data: Any, where: str | Path, *keys: str, images: int = 1
) -> dict[int | str, FileRow]:
    """Return the rows of JSON data by their positions, or by their keys in an object of rows.

    Args:
        data: A list or object of rows, or one row.
        where: The file and the place of the data in it, for errors.
        keys: Each row has one of these keys.
        images: Number of images of each row.
    """
    expected = f"the key {' or '.join(keys)}"
    if isinstance(data, dict) and not data.keys().isdisjoint(keys):  # a file of one line
        data = [data]
    if not isinstance(data, list | dict):
        raise ValueError(f"{where}: expected rows with {expected}, got {shortened(data)}")
    entries = dict(enumerate(data)) if isinstance(data, list) else data
    for place, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys().isdisjoint(keys):
            raise ValueError(f"{where}[{place}]: expected {expected}, got {shortened(entry)}")
    rows = validate(dict[int | str, FileRow], entries, str(where))
    for place, row in rows.items():
        if len(row.images) != images:
            got = row.images or shortened(entries[place])
            raise ValueError(f"{where}[{place}]: expected {images} image paths, got {got}")
    return rows


def image_folder(images: str | Path | None, file: Path) -> Path:
    """Return the folder `images`, or by default the folder of the file."""
    return file.parent if images is None else expand_user(images)


def stored_row(
    row: FileRow, file: Path, place: int | str, images: str | Path | None
) -> dict[str, Any]:
    """Return what all sources of files store of a row; paths are below the folder `images`."""
    folder = image_folder(images, file)
    paths = [str(folder / path) for path in row.paths()]
    return {"place": f"{file.name}[{place}]", "images": paths, "id": row.id, "split": row.split}


class StoredRows:
    """Base of the sources of files; also a `SharedImages`.

    Arrow holds the rows, so that worker processes share their memory. A row has its "place", such
    as "list.json[3]", and "images", paths. An image without suffix is a .jpg or a .png file.
    `split` keeps only the rows of a split ("val"), or of several ("train+restval").
    """

    def __init__(self, rows: list[dict[str, Any]], split: str | None = None) -> None:
        self._rows = Dataset.from_list(rows if split is None else _of_split(rows, split))

    def __len__(self) -> int:
        return len(self._rows)

    def image_number(self, index: int) -> int:
        """Return the first index that shows the same images."""
        check_index(index, len(self))
        return self._image_numbers[index]

    @cached_property
    def _image_numbers(self) -> list[int]:
        first: dict[tuple[str, ...], int] = {}
        images = map(tuple, self._rows["images"][:])
        return [first.setdefault(paths, number) for number, paths in enumerate(images)]

    def _row(self, index: int) -> dict[str, Any]:
        check_index(index, len(self))
        return self._rows[index]

    def _images(self, row: dict[str, Any]) -> tuple[Image.Image, ...]:
        """Decode the images of a row; raise SampleError for one that cannot be read."""
        paths = map(existing_image, row["images"])
        return tuple(decode_image(path, f"{row['place']} {path.name}") for path in paths)


def existing_image(image: str) -> Path:
    """Return the path of an image, with .jpg or .png if it has no suffix, whichever exists."""
    if Path(image).suffix:
        return Path(image)
    paths = [Path(f"{image}{suffix}") for suffix in (".jpg", ".png", "")]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def _of_split(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    wanted, known = set(split.split("+")), {row["split"] for row in rows}
    if absent := sorted(wanted - known):
        names = " or ".join(sorted(known - {""})) or "none, since the files have none"
        raise ValueError(f"split: expected {names}, got {'+'.join(absent)}")
    return [row for row in rows if row["split"] in wanted]
