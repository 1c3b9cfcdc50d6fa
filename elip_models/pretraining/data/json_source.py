"""Images with captions in JSON: lists in ALBEF's format, Karpathy's splits, COCO's and NoCaps'.

    [{"image": path, "caption": text or texts, "image_id", "boxes"}, ..]
    {"images": [{"filename", "filepath" (COCO), "split", "sentences": [{"raw"}, ..], "cocoid"}, ..]}
    {"images": [{"id", "file_name", "domain" (NoCaps)}, ..],
     "annotations": [{"image_id", "caption"}, ..] (none for test images)}

"image_id" and "boxes" are optional. "boxes" has for each caption a list of [left, top, width,
height] in pixels, as in COCO. They mark the objects that the caption names.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elip_models.images import SampleError, open_image_file
from elip_models.pretraining.data.data_spec import path_list
from elip_models.pretraining.data.file_rows import (
    FileRow,
    StoredRows,
    existing_image,
    read_rows,
    stored_row,
)
from elip_models.pretraining.data.json_files import read_json
from elip_models.pretraining.data.samples import Sample, clean_captions


class JsonSource(StoredRows):
    """A `Source` over JSON files; also `NamedMasks` and `SharedImages`.

    The id of a sample is its "image_id" or image path in a list, COCO's id, or Karpathy's "imgid".
    Entries with the same path share one image. A missing or damaged image and a missing caption
    raise SampleError for that sample only.

    Args:
        paths: One file or several.
        image_root: Folder of the images. None: the folder of each file.
        split: Split of Karpathy's files: "test", or several, "train+restval".
        needs_captions: False: an image without captions is a sample without captions, as in the
            files of test images of COCO and NoCaps.

    Raises:
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
        super().__init__(
            [row for file in path_list(paths) for row in _read(file, image_root)], split
        )
        self._needs_captions = needs_captions

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        if self._needs_captions and not row["captions"]:
            raise SampleError(f"{row['place']} {Path(row['images'][0]).name}", "no caption")
        (image,) = self._images(row)
        return Sample(image, tuple(row["captions"]), row["id"])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image; empty if the sample has none."""
        return tuple(self._row(index)["captions"])

    def domains(self) -> dict[str, str]:
        """Return NoCaps' domain of each image that has one, by its id."""
        domains = zip(self._rows["id"][:], self._rows["domain"][:], strict=True)
        return {image: domain for image, domain in domains if domain}

    def named_mask(self, index: int, caption: int) -> np.ndarray:
        """Return (H, W) bool, true inside the boxes of one caption; all false if it has none."""
        row = self._row(index)
        with open_image_file(existing_image(row["images"][0]), row["place"]) as image:
            mask = np.zeros((image.height, image.width), dtype=bool)
        for left, top, width, height in row["boxes"][caption] if row["boxes"] else ():
            rows = slice(max(0, round(top)), max(0, round(top + height)))
            mask[rows, max(0, round(left)) : max(0, round(left + width))] = True
        return mask


def _read(file: Path, image_root: str | Path | None) -> Iterator[dict[str, Any]]:
    for place, row in _images(file).items():
        captions, (path,) = clean_captions(row.texts), row.paths()
        if len(row.boxes) not in (0, len(captions)):
            wanted = f"a list for each of {len(captions)} captions"
            raise ValueError(f"{file}[{place}][boxes]: expected {wanted}, got {len(row.boxes)}")
        texts = {"captions": captions, "domain": row.domain, "boxes": row.boxes}
        yield stored_row(row, file, place, image_root) | texts | {"id": row.id or path}


def _images(file: Path) -> dict[int | str, FileRow]:
    """Return the images of a file, with the captions of COCO's annotations."""
    data = read_json(file, "a list of images with captions, or a file of Karpathy or COCO")
    if not isinstance(data, dict) or "images" not in data:
        return read_rows(data, file, "caption")
    images = read_rows(data["images"], f"{file}[images]", "filename", "file_name")
    captions: dict[str, list[str]] = defaultdict(list)
    annotations = data.get("annotations", [])
    for annotation in read_rows(annotations, f"{file}[annotations]", "caption", images=0).values():
        captions[annotation.image_id] += annotation.texts
    for image in images.values():
        image.texts += captions.pop(image.id, [])
    if captions:
        warnings.warn(
            f"{file}: left out {sum(map(len, captions.values()))} captions of {len(captions)} "
            "images that it does not list",
            stacklevel=2,
        )
    return images
