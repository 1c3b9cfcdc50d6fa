"""Photographs of a folder as normalised batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision.transforms.v2 as T
from PIL import Image
from torch import Tensor

from benchmarks.real.dinov2 import MEAN, PIXELS, STD

ENDINGS = (".jpg", ".jpeg", ".png")
BATCH = 25


def photograph_paths(folder: Path, names: Path | None = None) -> list[Path]:
    """Return the photographs of a folder, sorted by name.

    Args:
        folder: a folder with JPEG or PNG files.
        names: a text file with one file name a line, such as a split of Flickr8k; its order counts.
            Names without a file are dropped.
    """
    if names is not None:
        listed = (folder / line.strip() for line in names.read_text().splitlines())
        found = [path for path in listed if path.is_file()]
    else:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not found:
        raise ValueError(f"folder: expected photographs, got none in {folder}")
    return found


def batches(paths: Sequence[Path], pixels: int = PIXELS) -> Iterator[Tensor]:
    """Yield images (B, 3, pixels, pixels): the shorter side resized, the centre, normalised."""
    transform = T.Compose(
        [
            T.Resize(pixels, T.InterpolationMode.BICUBIC, antialias=True),
            T.CenterCrop(pixels),
            T.ToImage(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )
    for i in range(0, len(paths), BATCH):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[i : i + BATCH]]
        yield torch.stack(images)
