"""Karpathy's splits of COCO and Flickr30k, and the caption files of COCO and NoCaps.

{"images": [{"filename", "filepath" (COCO), "split", "sentences": [{"raw"}, ..]}, ..]}
{"images": [{"id", "file_name", "domain" (NoCaps)}, ..],
 "annotations": [{"image_id", "caption"}, ..] (none for test images)}
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from elip_models.pretraining.data.json_files import read_fields


class CaptionEntry(NamedTuple):
    """One image with its captions; `number` is its position in the file.

    `problem` is why it cannot be read, or ""; `domain` is NoCaps' domain of the image, or "".
    """

    number: int
    image: str
    captions: list[str]
    id: str
    problem: str = ""
    domain: str = ""


def caption_entries(file: Path, data: dict[str, Any], split: str | None) -> Iterator[CaptionEntry]:
    """Yield the images with their captions, all or those of a `split` ("test", "train+restval").

    After the images, an id of COCO that has captions and no image is an entry with a problem.

    Raises ValueError if an entry is malformed, or the file lacks the split.
    """
    if "annotations" in data or _lists_images_alone(data["images"]):
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
        (folder,) = read_fields(where, {"filepath": ""} | entry, filepath=str)
        image = str(PurePosixPath(folder, name))
        sample_id = text_id(where, entry, "cocoid", "imgid") or name
        yield CaptionEntry(number, image, texts, sample_id)
    missing = sorted(set(wanted or ()) - found)
    if missing:
        raise ValueError(f"split: expected some of {sorted(found)} of {file}, got {missing}")


def _lists_images_alone(images: Any) -> bool:
    """Return whether the images are those of a COCO file without annotations."""
    first = images[0] if isinstance(images, list) and images else None
    return isinstance(first, dict) and "file_name" in first


def _coco(file: Path, data: dict[str, Any]) -> Iterator[CaptionEntry]:
    given = {"annotations": []} | data
    images, annotations = read_fields(str(file), given, images=list, annotations=list)
    captions: dict[int, list[str]] = defaultdict(list)
    for number, entry in enumerate(annotations):
        where = f"{file}[annotations][{number}]"
        image_id, caption = read_fields(where, entry, image_id=int, caption=str)
        captions[image_id].append(caption)
    seen: set[int] = set()
    for number, entry in enumerate(images):
        where = f"{file}[images][{number}]"
        image_id, name = read_fields(where, entry, id=int, file_name=str)
        (domain,) = read_fields(where, {"domain": ""} | entry, domain=str)
        if image_id in seen:
            raise ValueError(f"{where}: id: expected another one for each image, got {image_id}")
        seen.add(image_id)
        yield CaptionEntry(number, name, captions[image_id], str(image_id), domain=domain)
    absent = [image_id for image_id in captions if image_id not in seen]
    for number, image_id in enumerate(absent, len(images)):
        name, lost = f"id {image_id}", len(captions[image_id])
        problem = f"the file has {lost} captions of this image, and no entry of it in images"
        yield CaptionEntry(number, name, [], str(image_id), problem)


def text_id(where: str, entry: dict[str, Any], *names: str) -> str:
    """Return the first of the fields `names` that is not null, as text, or ""."""
    name = next((name for name in names if entry.get(name) is not None), None)
    return "" if name is None else str(read_fields(where, entry, **{name: str | float})[0])
