"""Images with captions in JSON: lists in ALBEF's format, Karpathy's splits, COCO's and NoCaps'.

A list is [{"image": path, "caption": text or texts, "image_id": optional}, ...]. An entry may also
have "boxes": for each caption, a list of [left, top, width, height] in pixels, as in COCO. They
mark the objects that the caption names. `caption_files` documents the other formats.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from elip_models.images import SampleError, decode_image, open_image_file
from elip_models.pretraining.data.caption_files import caption_entries, text_id
from elip_models.pretraining.data.checks import check_index, existing_files
from elip_models.pretraining.data.json_files import read_fields, read_json
from elip_models.pretraining.data.sample import Sample, clean_captions
from elip_models.validation import (
    Bounds,
    TextError,
    check,
    check_text,
    mismatch_error,
    require_extra,
    shortened,
)

if TYPE_CHECKING:
    from datasets import Dataset

_EXPECTED = (
    'a list of {"image": path, "caption": text or list of texts}, or {"images": ..} as in '
    "Karpathy's splits and COCO's captions"
)
_Pixels = Annotated[float, Bounds(-(2**24), 2**24)]  # exact in float32
_Box = tuple[_Pixels, _Pixels, _Pixels, _Pixels]


class JsonSource:
    """A `Source` over one or several JSON files; also `NamedMasks` and `SharedImages`.

    The id of a sample is its "image_id" or image path in a list, COCO's id, or Karpathy's "imgid".
    Entries with the same path share one image. A missing or damaged image, an empty caption or
    invalid Unicode raises SampleError for that sample only.

    Args:
        paths: One file or several.
        image_root: Folder of the images. None: the folder of each file.
        split: Split of Karpathy's files: "test", or several, "train+restval".
        needs_captions: False: an image without captions is a sample without captions, as in the
            files of test images of COCO and NoCaps.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file has none of the formats.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        image_root: str | Path | None = None,
        split: str | None = None,
        needs_captions: bool = True,
    ) -> None:
        if not isinstance(image_root, str | Path | None):
            raise TypeError(f"image_root: expected a folder or None, got {image_root!r}")
        check("split", split, str | None)
        check("needs_captions", needs_captions, bool)
        self._files = existing_files("paths", paths)
        self._root = image_root
        self._needs_captions = needs_captions
        self._index = _build_index(self._files, split)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        row = self._index[index]
        name = f"{self._files[row['file']].name}[{row['number']}] {row['image']}"
        lacks_caption = self._needs_captions and not row["captions"]
        if problem := row["problem"] or ("no caption" if lacks_caption else ""):
            raise SampleError(name, problem)
        image = decode_image(self._image_path(row), name)
        return Sample(image, tuple(row["captions"]), row["id"])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image; empty if the sample has none."""
        check_index(index, len(self))
        return tuple(self._index[index]["captions"])

    def domains(self) -> dict[str, str]:
        """Return NoCaps' domain of each image that has one, by its id."""
        ids, names = (self._index.data.column(name).to_pylist() for name in ("id", "domain"))
        return {each: name for each, name in zip(ids, names, strict=True) if name}

    @cached_property
    def _image_numbers(self) -> np.ndarray:
        """Return (n,) int64: for each entry, the first entry with the same image path."""
        first: dict[tuple[Path, str], int] = {}
        folders = [self._folder(file) for file in range(len(self._files))]
        columns = (self._index.data.column(name).to_pylist() for name in ("file", "image"))
        rows = ((folders[file], image) for file, image in zip(*columns, strict=True))
        numbers = [first.setdefault(row, number) for number, row in enumerate(rows)]
        return np.array(numbers, dtype=np.int64)

    def _folder(self, file: int) -> Path:
        return self._files[file].parent if self._root is None else Path(self._root)

    def _image_path(self, row: dict[str, Any]) -> Path:
        return self._folder(row["file"]) / row["image"]

    def image_number(self, index: int) -> int:
        """Return the first index that shows the same image."""
        check_index(index, len(self))
        return int(self._image_numbers[index])

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """Return (H, W) bool, true inside the boxes of one caption; all false if it has none."""
        check_index(index, len(self))
        row = self._index[index]
        with open_image_file(self._image_path(row), row["image"]) as image:
            mask = np.zeros((image.height, image.width), dtype=bool)
        for left, top, width, height in row["boxes"][caption] if row["boxes"] else ():
            rows = slice(max(0, round(top)), max(0, round(top + height)))
            mask[rows, max(0, round(left)) : max(0, round(left + width))] = True
        return mask


def _build_index(files: list[Path], split: str | None) -> "Dataset":
    """Return an Arrow table with one row per entry; "problem" is why it cannot be read, or ""."""
    with require_extra("JsonSource"):
        from datasets import Dataset, Features, Value

    columns: dict[str, list[Any]] = {
        name: []
        for name in ("file", "number", "image", "captions", "id", "boxes", "domain", "problem")
    }
    for place, file in enumerate(files):
        for number, entry in _read_entries(file, split):
            row = _with_problem(entry) | {"file": place, "number": number}
            for name, value in row.items():
                columns[name].append(value)
    text, integer = Value("string"), Value("int64")
    kinds = {"file": integer, "number": integer}
    kinds |= {"captions": [text], "boxes": [[[Value("float32")]]]}
    features = Features({name: kinds.get(name, text) for name in columns})
    return Dataset.from_dict(columns, features=features)


def _read_entries(file: Path, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each entry, with its image, captions, id and boxes."""
    entries = read_json(file, _EXPECTED)
    if isinstance(entries, dict) and "images" in entries:
        for each in caption_entries(file, entries, split):
            entry = {"image": each.image, "captions": clean_captions(each.captions)}
            entry |= {"id": each.id, "boxes": [], "domain": each.domain, "problem": each.problem}
            yield each.number, entry
        return
    if not isinstance(entries, list):
        raise ValueError(f"{file}: expected {_EXPECTED}, got a {type(entries).__name__}")
    if split is not None:
        raise ValueError(f"split: expected none, since {file} has none, got {split!r}")
    for number, entry in enumerate(entries):
        where = f"{file}[{number}]"
        image, caption = read_fields(where, entry, image=str, caption=Any)
        try:
            captions = clean_captions(caption)
            boxes = _boxes(entry.get("boxes", []), len(captions))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        sample_id = text_id(where, entry, "image_id") or image
        entry = {"image": image, "captions": captions, "id": sample_id}
        yield number, entry | {"boxes": boxes, "domain": ""}


def _with_problem(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with its problem; invalid Unicode is escaped or removed."""
    try:
        check_text("image", entry["image"])
        check_text("image_id", entry["id"])
        check_text("domain", entry["domain"])
        check_text("caption", *entry["captions"])
        return {"problem": ""} | entry
    except TextError as error:
        names = {name: ascii(entry[name]) for name in ("image", "id")}
        empty = {"captions": [], "boxes": [], "domain": ""}
        return entry | names | empty | {"problem": str(error)}


def _boxes(value: Any, captions: int) -> list[list[list[float]]]:
    """Return the boxes of each caption, or an empty list. Raises ValueError for other values."""
    if not _are_boxes(value) or len(value) not in (0, captions):
        raise ValueError(
            f"boxes: expected a list for each of {captions} captions, of [left, top, width, "
            f"height] each, got {shortened(value)}"
        )
    return value


def _are_boxes(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(boxes, list) for boxes in value):
        return False
    each = (tuple(box) if isinstance(box, list) else box for boxes in value for box in boxes)
    return all(mismatch_error(box, _Box) is None for box in each)
