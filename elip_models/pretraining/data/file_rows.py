"""Rows of the files that authors publish, and a source whose images are read on access.

`FileRow` names the fields of all formats; the sources of captions and of the tasks show the files.
"""

import os
from collections.abc import Sequence
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
from elip_models.pretraining.data.checks import check_index, expand_user
from elip_models.pretraining.data.json_files import read_json, validate
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


def _joined(value: Any) -> Any:
    """Return the attributes of a Visual Genome pair as one text."""
    return "_".join(map(str, value)) if isinstance(value, list) else value


Text = Annotated[str, AfterValidator(_encodable)]
"""A text without unpaired surrogates, which JSON can hold and Arrow cannot."""
Id = Annotated[str, Field(coerce_numbers_to_str=True), AfterValidator(_encodable)]
Texts = Annotated[list[Text], BeforeValidator(_texts)]
Box = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]

_JOINED = (
    ("images", ("image_0", "image_1")),
    ("texts", ("caption_0", "caption_1")),
    ("texts", ("true_caption", "false_caption")),
    ("texts", ("caption", "negative_caption")),
    ("box", ("bbox_x", "bbox_y", "bbox_w", "bbox_h")),
)
"""Field, and the fields of Winoground, ARO and SugarCrepe that together make it."""


def _named(default: Any, *names: str) -> Any:
    return Field(default, validation_alias=AliasChoices(*names))


class FileRow(BaseModel):
    """A row of a file; each field lists its names in the formats."""

    images: Texts = _named(
        *([], "images", "image", "filename", "file_name", "image_path"),
        *("Flickr30K_ID", "Flikr30kID"),  # of SNLI-VE, and of its files of 2018
    )
    folder: Id = _named("", "filepath", "directory")
    texts: Texts = _named(
        *([], "texts", "caption", "sentences", "caption_options"),
        *("question", "sentence2", "sentence", "text"),
    )
    answers: Texts = _named([], "answer", "answers", "gold_label", "label")
    first_answer: Text = _named("", "multiple_choice_answer")
    id: Id = _named("", "question_id", "pairID", "identifier", "image_id", "cocoid", "imgid", "id")
    image_id: Id = ""
    split: Text = ""
    category: Annotated[Text, BeforeValidator(_joined)] = _named(
        "", "collapsed_tag", "relation_name", "attributes", "domain"
    )
    box: Box | None = None
    boxes: list[list[Box]] = []
    proposals: list[Box] | None = None

    @model_validator(mode="before")
    @classmethod
    def _join(cls, row: dict[str, Any]) -> dict[str, Any]:
        for field, names in _JOINED:
            if all(map(row.__contains__, names)):
                row = row | {field: [row[name] for name in names]}
        if "identifier" in row:  # of NLVR2
            pair = str(row["identifier"]).rpartition("-")[0]
            row = row | {"images": [f"{pair}-img0.png", f"{pair}-img1.png"]}
        return row

    @property
    def text(self) -> str:
        """Return the only text of the row."""
        return " ".join(self.texts)

    def paths(self) -> list[str]:
        """Return the paths of the images below the folder of images."""
        return [f"{self.folder}/{image}" if self.folder else image for image in self.images]


def read_rows(file: Path, *keys: str, images: int = 1) -> dict[int | str, FileRow]:
    """Return the rows of a file by their positions, or by their keys in an object of rows.

    Args:
        file: A JSON list or object of rows, or one row per line.
        keys: Each row has one of these keys.
        images: Number of images of each row.
    """
    data = read_json(file, f"rows with the key {' or '.join(keys)}")
    return as_rows(data, str(file), *keys, images=images)


def as_rows(data: Any, where: str, *keys: str, images: int = 1) -> dict[int | str, FileRow]:
    """Return the rows of a list or object, see `read_rows`; `where` begins the errors."""
    expected = f"the key {' or '.join(keys)}"
    if isinstance(data, dict) and not data.keys().isdisjoint(keys):  # a file of one line
        data = [data]
    if not isinstance(data, list | dict):
        raise ValueError(f"{where}: expected rows with {expected}, got {shortened(data)}")
    entries = dict(enumerate(data)) if isinstance(data, list) else data
    for place, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys().isdisjoint(keys):
            raise ValueError(f"{where}[{place}]: expected {expected}, got {shortened(entry)}")
    rows = validate(dict[int | str, FileRow], entries, where)
    for place, row in rows.items():
        if len(row.images) != images:
            got = row.images or shortened(entries[place])
            raise ValueError(f"{where}[{place}]: expected {images} image paths, got {got}")
    return rows


class StoredRows:
    """Base of the sources of files; also a `SharedImages`.

    Arrow holds the rows, so that worker processes share their memory. A row has the number of its
    "file", its "place" in it, and "images", relative paths.

    Args:
        files: The files.
        image_root: Folder of the images. None: the folder of each file.
        rows: The rows. An image without suffix is a .jpg or a .png file.
        split: Only the rows of a split ("testA"), or of several ("train+restval").
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_root: str | Path | None,
        rows: list[dict[str, Any]],
        split: str | None = None,
    ) -> None:
        self._files = files
        self._root = None if image_root is None else expand_user(image_root)
        self._rows = Dataset.from_list(_of_split(rows, split))

    def __len__(self) -> int:
        return len(self._rows)

    def image_number(self, index: int) -> int:
        """Return the first index that shows the same images."""
        check_index(index, len(self))
        return self._image_numbers[index]

    @cached_property
    def _image_numbers(self) -> list[int]:
        first: dict[tuple[str, ...], int] = {}
        folders = [str(self._folder(file)) for file in range(len(self._files))]
        columns = zip(self._rows["file"][:], self._rows["images"][:], strict=True)
        images = ((folders[file], *images) for file, images in columns)
        return [first.setdefault(key, number) for number, key in enumerate(images)]

    def _row(self, index: int) -> dict[str, Any]:
        check_index(index, len(self))
        return self._rows[index]

    def _folder(self, file: int) -> Path:
        return self._files[file].parent if self._root is None else self._root

    def _name(self, row: dict[str, Any]) -> str:
        return f"{self._files[row['file']].name}[{row['place']}]"

    def _paths(self, row: dict[str, Any]) -> list[Path]:
        return [existing_image(self._folder(row["file"]) / image) for image in row["images"]]

    def _images(self, row: dict[str, Any]) -> tuple[Image.Image, ...]:
        """Decode the images of a row; raise SampleError for one that cannot be read."""
        paths = self._paths(row)
        return tuple(decode_image(path, f"{self._name(row)} {path.name}") for path in paths)


def existing_image(path: Path) -> Path:
    """Return the path of an image, with .jpg or .png if it has no suffix, whichever exists."""
    if path.suffix:
        return path
    paths = [Path(f"{path}{suffix}") for suffix in (".jpg", ".png", "")]
    return next((named for named in paths if os.path.isfile(named)), paths[0])


def _of_split(rows: list[dict[str, Any]], split: str | None) -> list[dict[str, Any]]:
    if split is None:
        return rows
    wanted, known = set(split.split("+")), {row["split"] for row in rows}
    if absent := sorted(wanted - known):
        names = " or ".join(sorted(known - {""})) or "none, since the files have none"
        raise ValueError(f"split: expected {names}, got {'+'.join(absent)}")
    return [row for row in rows if row["split"] in wanted]
