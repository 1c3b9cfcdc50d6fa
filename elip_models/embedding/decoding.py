"""Batches of decoded images, in the order of the source, read and decoded in worker processes."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elip_models.embedding.image_source import ImageSource
from elip_models.embedding.preprocessing import check_pixels
from elip_models.embedding.stored import Payload, read
from elip_models.images import SampleError, decode_image

Transform = Callable[[Image.Image], Tensor]
MOST_WORKERS = 16


class Decoded(NamedTuple):
    """One image: its row, pixels (3, H, W) and SHA-256; or the reason why it has no pixels."""

    row: int
    pixels: Tensor | None
    sha256: str
    reason: str = ""


class Batch(NamedTuple):
    """The images of a batch that could be decoded, and the others.

    Attributes:
        rows: rows of the source.
        sha256: of the bytes of each image.
        pixels: (B, 3, H, W), or None if there is no image.
        skipped: row and reason of each image that could not be decoded.
    """

    rows: list[int]
    sha256: list[str]
    pixels: Tensor | None
    skipped: list[tuple[int, str]]

    @property
    def size(self) -> int:
        """The number of images, the skipped ones included."""
        return len(self.rows) + len(self.skipped)


class _Decoder(Dataset):
    """Decodes and transforms the image of a row and a payload, which stand for an index."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __getitem__(self, item: tuple[int, Payload]) -> Decoded:
        row, payload = item
        try:
            content = read(payload)
            digest = hashlib.sha256(content).hexdigest()
            image = decode_image(io.BytesIO(content), "")
        except SampleError as error:
            return Decoded(row, None, "", error.reason)
        try:
            return Decoded(row, check_pixels(self.transform(image)), digest)
        except Exception as error:  # libraries raise any error for an image of an odd shape
            reason = f"cannot be preprocessed: {error!s:.300}"
            return Decoded(row, None, "", reason)


def _collate(images: list[Decoded]) -> Batch:
    found = [each for each in images if each.pixels is not None]
    return Batch(
        rows=[each.row for each in found],
        sha256=[each.sha256 for each in found],
        pixels=torch.stack([each.pixels for each in found]) if found else None,
        skipped=[(each.row, each.reason) for each in images if each.pixels is None],
    )


class _Payloads:
    """Batches of payloads of the images in some ranges of rows; no batch spans two ranges."""

    def __init__(self, source: ImageSource, ranges: Iterable[range], batch_size: int) -> None:
        self.source, self.ranges, self.batch_size = source, list(ranges), batch_size

    def __iter__(self) -> Iterator[list[tuple[int, Payload]]]:
        for rows in self.ranges:
            batch: list[tuple[int, Payload]] = []
            for row, payload in zip(rows, self.source.payloads(rows.start, rows.stop), strict=True):
                batch.append((row, payload))
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch


def default_workers(device: torch.device) -> int:
    """Return the number of worker processes: on a CPU half of the cores, which the model shares."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // 2) if device.type == "cpu" else min(MOST_WORKERS, cores or 1)


def decoded_batches(
    source: ImageSource,
    ranges: Iterable[range],
    transform: Transform,
    batch_size: int,
    *,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the images in some ranges of rows, in order, in batches of `batch_size`.

    The last batch of a range may be smaller, so the batches of a range do not depend on the others.
    """
    loader = DataLoader(
        _Decoder(transform),
        batch_sampler=_Payloads(source, ranges, batch_size),
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
    )
    return iter(loader)


def decoded_sample(source: ImageSource, count: int, transform: Transform, workers: int) -> Batch:
    """Return up to `count` images of the source as one batch."""
    items = list(source.sample(count))
    chunks = [items[i : i + 8] for i in range(0, len(items), 8)]
    loader = DataLoader(
        _Decoder(transform), batch_sampler=chunks, collate_fn=list, num_workers=workers
    )
    return _collate([each for chunk in loader for each in chunk])
