"""Karpathy's splits of COCO and Flickr30k, and COCO's own captions.

{"images": [{"filename", "filepath" (COCO), "split", "sentences": [{"raw"}, ..]}, ..]}
{"images": [{"id", "file_name"}, ..], "annotations": [{"image_id", "caption"}, ..]}
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from elip_models.data.json_files import read_fields


class Captioned(NamedTuple):
    """number: of the entry in its file."""

    number: int
    image: str
    captions: list[str]
    id: str


def captioned(file: Path, data: dict[str, Any], split: str | None) -> Iterator[Captioned]:
    """The images of such a file, all or those of a split ("test", "train+restval"), with their
    captions; ValueError names the first entry that is malformed.
    """
    if "annotations" in data:
        if split is not None:
            raise ValueError(f"split: expected none, for {file} has none, got {split!r}")
        return _coco(file, data)
    return _karpathy(file, data, split)


def _karpathy(file: Path, data: dict[str, Any], split: str | None) -> Iterator[Captioned]:
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
        yield Captioned(number, image, texts, str(entry.get("cocoid", entry.get("imgid", name))))
    missing = sorted(set(wanted or ()) - found)
    if missing:
        raise ValueError(f"split: expected some of {sorted(found)} of {file}, got {missing}")


def _coco(file: Path, data: dict[str, Any]) -> Iterator[Captioned]:
    images, annotations = read_fields(str(file), data, images=list, annotations=list)
    captions: dict[int, list[str]] = defaultdict(list)
    for number, entry in enumerate(annotations):
        where = f"{file}[annotations][{number}]"
        image_id, caption = read_fields(where, entry, image_id=int, caption=str)
        captions[image_id].append(caption)
    for number, entry in enumerate(images):
        where = f"{file}[images][{number}]"
        image_id, name = read_fields(where, entry, id=int, file_name=str)
        yield Captioned(number, name, captions[image_id], str(image_id))
