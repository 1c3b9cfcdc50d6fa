"""Pictures of a reduction: which patches survive each stage, beside the caption."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_models.reduction.strategy import StageInfo

DIM = 0.15  # what is left of a dropped patch's colour, on white


def surviving_patches(infos: Sequence[StageInfo], num_patches: int) -> list[Tensor]:
    """For each stage (B, num_patches) bool: the patches that are still tokens of their own."""
    survivors: list[Tensor] = []
    if not infos:
        return survivors
    B, num_tokens = infos[0].attention.shape
    p = num_tokens - num_patches  # prefix tokens, no patches
    patch = torch.arange(-p, num_patches, device=infos[0].attention.device).clamp(min=-1)
    patch = patch.expand(B, -1)
    for info in infos:  # a merged token is no single patch either
        kept = patch.gather(1, info.reduction.kept)
        patch = F.pad(kept, (p, 1), value=-1)
        alive = torch.zeros(B, num_patches + 1, dtype=torch.bool, device=patch.device)
        survivors.append(alive.scatter_(1, patch + 1, True)[:, 1:])
    return survivors


def draw_survivors(
    images: Tensor,
    captions: Sequence[str],
    survivors: Sequence[Tensor],
    path: Path,
    *,
    titles: Sequence[str],
) -> Path:
    """Write a PNG: one row an image, with the input, what each stage keeps, and the caption.

    Args:
        images: (B, 3, S, S) in [0, 1].
        captions: one for each image.
        survivors: for each stage (B, num_patches) bool, of a square grid of patches.
        path: of the PNG.
        titles: one for each stage.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            "elip_models.visualize needs matplotlib: pip install 'elip-kernels[demo]'"
        ) from error
    columns = len(survivors) + 2
    figure = Figure(figsize=(1.7 * columns + 0.8, 1.85 * len(images)), layout="constrained")
    widths = [1.0] * (columns - 1) + [1.5]
    grid = figure.subplots(len(images), columns, squeeze=False, width_ratios=widths)
    for axis, title in zip(grid[0], ["image", *titles], strict=False):
        axis.set_title(title, fontsize=9)
    for axis in grid.flat:
        axis.set_axis_off()
    for b, (row, image, caption) in enumerate(zip(grid, images, captions, strict=True)):
        row[0].imshow(image.permute(1, 2, 0))
        for axis, alive in zip(row[1:-1], survivors, strict=True):
            axis.imshow(_dimmed(image, alive[b]).permute(1, 2, 0))
        row[-1].text(0.0, 0.5, textwrap.fill(caption, 26), fontsize=9, va="center")
    figure.savefig(path, dpi=130)
    return path


def _dimmed(image: Tensor, alive: Tensor) -> Tensor:
    """image (3, S, S) with the patches that are gone almost white."""
    side = round(alive.numel() ** 0.5)
    size = image.shape[1] // side
    mask = alive.view(side, side).repeat_interleave(size, 0).repeat_interleave(size, 1)
    return torch.where(mask, image, 1 - DIM + DIM * image)
