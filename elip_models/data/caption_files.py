"""Karpathy's splits of COCO and Flickr30k, and the caption files of COCO.

{"images": [{"filename", "filepath" (COCO), "split", "sentences": [{"raw"}, ..]}, ..]}
{"images": [{"id", "file_name"}, ..], "annotations": [{"image_id", "caption"}, ..]}
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from elip_models.data.json_files import read_fields


class CaptionEntry(NamedTuple):
    """One image with its captions; `number` is its position in the file."""

    number: int
    image: str
    captions: list[str]
    id: str


def caption_entries(file: Path, data: dict[str, Any], split: str | None) -> Iterator[CaptionEntry]:
    """Yield the images with their captions, all or those of a `split` ("test", "train+restval").

    Raises ValueError if an entry is malformed, or the file lacks the split.
    """
    if "annotations" in data:
        if split is not None:
            raise ValueError(f"split: expected none, since {file} has none, got {split!r}")
        return _coco(file, data)
    return _karpathy(file, data, split)


def _karpathy(file: Path, data: dict[str, Any], split: str | None) -> Iterator[CaptionEntry]:
    (images,) = read_fields(str(file), data, images=list)
    wanted, found = None if split is None else split.split("+"), set()
    for number, entry in enumerate(images):
        where = f"{file}[images][{number}]"
        name, part, sentences = read_fields(where, entry, filename=str, split=str, sentences=list)
        found.add(part)
        if wanted is not None and part not in wanted:
            continue
        each = enumerate(sentences)
        texts = [read_fields(f"{where}[sentences][{i}]", text, raw=str)[0] for i, text in each]
        image = str(PurePosixPath(entry.get("filepath", ""), name))
        yield CaptionEntry(number, image, texts, str(entry.get("cocoid", entry.get("imgid", name))))
    missing = sorted(set(wanted or ()) - found)
    if missing:
        raise ValueError(f"split: expected some of {sorted(found)} of {file}, got {missing}")


def _coco(file: Path, data: dict[str, Any]) -> Iterator[CaptionEntry]:
    images, annotations = read_fields(str(file), data, images=list, annotations=list)
    captions: dict[int, list[str]] = defaultdict(list)
    for number, entry in enumerate(annotations):
        where = f"{file}[annotations][{number}]"
        image_id, caption = read_fields(where, entry, image_id=int, caption=str)
        captions[image_id].append(caption)
    for number, entry in enumerate(images):
        where = f"{file}[images][{number}]"
        image_id, name = read_fields(where, entry, id=int, file_name=str)
        yield CaptionEntry(number, name, captions[image_id], str(image_id))
