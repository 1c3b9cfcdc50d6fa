"""The data of tasks in files: captions of images, masks of images, and questions about images.

captions   CSV lines image,caption, with or without these two words as the first line; or JSON rows
           {"image": path, "caption": text} or {"image": path, "captions": [text, ..]}
masks      a PNG of class indices for each image, with the same name, in another folder
questions  JSON rows {"image": path or list of paths, "question": text, "answers": [text, ..]}, in
           which the answers can be missing

JSON rows are a list in one file, or one row a line (.jsonl). Paths are relative to the folder of
the images.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elip_models.images import SampleError, open_image_file
from elip_models.validation import shortened

HEADER = ["image", "caption"]


class Question(NamedTuple):
    """A question about images.

    Attributes:
        images: paths of the images, in their order.
        question: the text.
        answers: right answers; () if none is known.
    """

    images: tuple[Path, ...]
    question: str
    answers: tuple[str, ...] = ()


def read_captions(file: Path, folder: Path) -> dict[Path, tuple[str, ...]]:
    """Return the captions of each image that a CSV or JSON file names, in its order.

    Raises:
        ValueError: a file or a row of another form, or an image that is missing in the folder.
    """
    captions: dict[Path, list[str]] = {}
    for place, row in _rows("captions", file, csv_keys=HEADER):
        texts = row.get("captions", row.get("caption"))
        texts = [texts] if isinstance(texts, str) else texts
        if not _are_texts(texts):
            raise ValueError(
                f"captions: expected a text in each row, got {shortened(row)} in {place}; add a "
                "caption, or remove the row"
            )
        (path,) = _paths("captions", row, folder, place, single=True)
        captions.setdefault(path, []).extend(texts)
    return {path: tuple(texts) for path, texts in captions.items()}


def mask_files(images: Sequence[Path], folder: Path, masks: Path) -> list[Path]:
    """Return the mask of each image: the PNG with the same name and subfolder, in another folder.

    Args:
        images: all images of `folder`.
        folder: of the images.
        masks: of the masks.

    Raises:
        ValueError: an image without a mask, or a mask without an image.
    """
    if not masks.is_dir():
        raise ValueError(f"masks: expected a folder of PNG files, got {shortened(str(masks))}")
    files = [masks / path.relative_to(folder).with_suffix(".png") for path in images]
    missing = next((i for i, file in enumerate(files) if not file.is_file()), None)
    if missing is not None:
        raise ValueError(
            f"masks: expected a PNG for each image, got none for {images[missing].name}: "
            f"{files[missing]} is missing; add it, or remove the image"
        )
    unused = sorted({*masks.rglob("*.png")} - {*files})
    if unused:
        raise ValueError(
            f"masks: expected an image for each mask, got none for {unused[0]}; add the image to "
            f"{folder}, or remove the mask"
        )
    return files


class MaskFiles(Sequence):
    """Masks (H, W) int64 of files, read when indexed.

    Args:
        files: of `mask_files`.
        images: the image of each mask, whose size it has.
    """

    def __init__(self, files: Sequence[Path], images: Sequence[Path]) -> None:
        self.files, self.images = list(files), list(images)

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        """Read mask i; ValueError for a file of another form or size."""
        file, image = self.files[i], self.images[i]
        try:
            with open_image_file(image, str(image)) as opened:
                width, height = opened.size
            with open_image_file(file, str(file)) as mask:
                mode, size, classes = mask.mode, mask.size, np.array(mask)
        except SampleError as error:
            raise ValueError(f"masks: {error}") from error
        if mode not in ("1", "L", "P", "I;16", "I"):
            raise ValueError(
                f"masks: expected one channel of class indices, got {mode} in {file}; save the "
                "indices, not colours"
            )
        if size != (width, height):
            raise ValueError(
                f"masks: expected the size of the image, {width} x {height} pixels, got "
                f"{size[0]} x {size[1]} in {file}; resize the mask by nearest neighbours, or "
                "remove it and its image"
            )
        return torch.from_numpy(classes.astype(np.int64))


def read_questions(file: Path, folder: Path) -> list[Question]:
    """Return the questions of a JSON file.

    Raises:
        ValueError: a file or a row of another form, or an image that is missing in the folder.
    """
    questions = []
    for place, row in _rows("questions", file):
        text, answers = row.get("question"), row.get("answers", row.get("answer"))
        if not _are_texts([text]):
            raise ValueError(
                f"questions: expected a question in each row, got {shortened(row)} in {place}; add "
                "it, or remove the row"
            )
        answers = [] if answers is None else [answers] if isinstance(answers, str) else answers
        if answers != [] and not _are_texts(answers):
            raise ValueError(
                f"questions: expected texts as answers, got {shortened(answers)} in {place}; leave "
                "out answers if none is known"
            )
        questions.append(Question(_paths("questions", row, folder, place), text, tuple(answers)))
    return questions


def _rows(
    argument: str, file: Path, *, csv_keys: list[str] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a file, each with its place in words."""
    kinds = ".json or .jsonl" if csv_keys is None else ".csv, .json or .jsonl"
    if not file.is_file() or file.suffix not in kinds:
        raise ValueError(f"{argument}: expected a file {kinds}, got {shortened(str(file))}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            rows: Any = _csv_rows(text, csv_keys)
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, RecursionError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{argument}: expected a readable {file.suffix} file, got {file}: {error}"
        ) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{argument}: expected rows with the key image, got {shortened(rows)}")
    return [(f"row {i} of {file.name}", row) for i, row in enumerate(rows, start=1)]


def _csv_rows(text: str, keys: list[str]) -> list[dict[str, str]]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    bad = next((row for row in rows if len(row) != len(keys)), None)
    if bad is not None:
        raise ValueError(
            f"expected lines {','.join(keys)}, with quotation marks around a text that has commas, "
            f"got {shortened(','.join(bad))}"
        )
    return [dict(zip(keys, row, strict=True)) for row in rows[rows[:1] == [keys] :]]


def _paths(
    argument: str, row: dict[str, Any], folder: Path, place: str, *, single: bool = False
) -> tuple[Path, ...]:
    """Return the paths of the images of a row; ValueError if one is missing."""
    names = row.get("image", row.get("images"))
    names = [names] if isinstance(names, str) else names
    if not _are_texts(names) or (single and len(names) > 1):
        wanted = "the path of an image" if single else "paths of images"
        raise ValueError(
            f"{argument}: expected {wanted} in each row, got {shortened(row)} in {place}; add it "
            "under the key image, or remove the row"
        )
    paths = tuple(folder / name for name in names)
    missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise ValueError(
            f"{argument}: expected images in {folder}, got {shortened(missing[0])} in {place}, "
            "which is missing; add the image, or remove the row"
        )
    return paths


def _are_texts(values: Any) -> bool:
    """Return whether this is a list of at least one text, none of them empty."""
    is_list = isinstance(values, list) and bool(values)
    return is_list and all(isinstance(text, str) and text.strip() for text in values)
