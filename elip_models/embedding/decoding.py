"""Batches of decoded images, in the order of the source, read and decoded in worker processes."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elip_models.embedding.source import ImageSource, Payload, read_payload
from elip_models.images import SampleError, decode_image

Transform = Callable[[Image.Image], Tensor]
MOST_WORKERS = 16
SAMPLE_BATCH = 8  # images that a worker decodes at a time for a sample


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


class _Decoder(Dataset):
    """Decode and transform images; an item is a row of the source and its payload."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __getitem__(self, item: tuple[int, Payload]) -> tuple[int, str, Tensor | str]:
        """Return the row, the SHA-256 and the pixels, or the reason why there are none."""
        row, payload = item
        try:
            content = read_payload(payload)
            image = decode_image(io.BytesIO(content), "")
        except SampleError as error:
            return row, "", error.reason
        try:
            return row, hashlib.sha256(content).hexdigest(), self.transform(image)
        except Exception as error:  # libraries raise any error for an image of an odd shape
            return row, "", f"cannot be preprocessed: {error!s:.300}"


def _collate(images: Iterable[tuple[int, str, Tensor | str]]) -> Batch:
    rows, digests, pixels, skipped = [], [], [], []
    for row, digest, decoded in images:
        if isinstance(decoded, str):
            skipped.append((row, decoded))
        else:
            rows.append(row)
            digests.append(digest)
            pixels.append(decoded)
    return Batch(rows, digests, torch.stack(pixels) if pixels else None, skipped)


def _payload_batches(
    source: ImageSource, ranges: Iterable[range], batch_size: int
) -> Iterator[list[tuple[int, Payload]]]:
    for rows in ranges:
        payloads = zip(rows, source.payloads(rows.start, rows.stop), strict=True)
        while batch := list(islice(payloads, batch_size)):
            yield batch


def default_workers(device: torch.device, cores: int | None = None) -> int:
    """Return the number of worker processes: on a CPU half of the cores, which the model shares."""
    if cores is None:
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
        batch_sampler=_payload_batches(source, ranges, batch_size),
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
    )
    return iter(loader)


def decoded_sample(source: ImageSource, count: int, transform: Transform, workers: int) -> Batch:
    """Return up to `count` images of the source, in evenly spaced parts, as one batch."""
    items = list(source.sample(count))
    batches = [items[i : i + SAMPLE_BATCH] for i in range(0, len(items), SAMPLE_BATCH)]
    loader = DataLoader(
        _Decoder(transform), batch_sampler=batches, collate_fn=list, num_workers=workers
    )
    return _collate(image for batch in loader for image in batch)
