"""Pictures of merging: the patches of one token in their mean colour, with an outline.

token_s(n) = the token that contains patch n after step s, by the source maps of all steps   (B, P)
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_models.analysis.visualize import (
    GREY,
    make_panels,
    save_figure,
    source_maps,
    write_caption,
)
from elip_models.reduction.strategy import StageInfo

MAX_STEPS = 4  # steps in a picture, evenly spaced up to the last one
PIXELS = 256  # smallest height of an image, so that an outline is thin
NOTE = (
    "The patches of one token have their mean colour, and may be in separate areas; patches that "
    "were not merged are unchanged; dropped patches are grey. Numbers are without prefix tokens."
)


def tokens_of_patches(infos: Sequence[StageInfo], num_patches: int) -> list[Tensor]:
    """Return for each step (B, num_patches) int64: the token of each patch, -1 if dropped."""
    found = []
    for source in source_maps(infos, num_patches)[1:]:
        holds, token = source.to(torch.uint8).max(1)
        found.append(token.masked_fill(holds == 0, -1))
    return found


def merged_image(image: Tensor, tokens: Tensor) -> Tensor:
    """Return a picture (3, s H, s W) of the patches that form one token, at least `PIXELS` high.

    `image` is (3, H, W) in [0, 1], `tokens` (rows, columns) one item of `tokens_of_patches`.
    """
    scale = max(1, -(-PIXELS // image.shape[1]))
    image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    wide = F.interpolate(tokens[None, None].float(), size=image.shape[1:])[0, 0].long()
    for token in tokens.unique().tolist():
        inside = wide == token
        if token < 0:
            image[:, inside] = GREY
        elif (tokens == token).sum() > 1:
            image[:, inside] = image[:, inside].mean(1, keepdim=True)
    edge = torch.zeros_like(wide, dtype=torch.bool)
    edge[:, 1:] |= wide[:, 1:] != wide[:, :-1]
    edge[1:] |= wide[1:] != wide[:-1]
    return image.masked_fill(edge, 0.0)


def draw_merging(
    images: Tensor,
    captions: Sequence[str],
    infos: Sequence[StageInfo],
    path: Path,
    *,
    grid: tuple[int, int],
    title: str = "",
) -> Path:
    """Write a PNG with one row for each image: the input, tokens after a few steps, the caption.

    The arguments are those of `draw_reduction`.
    """
    count = min(MAX_STEPS, len(infos))
    shown = [len(infos) * (k + 1) // count - 1 for k in range(count)]
    found = tokens_of_patches(infos, grid[0] * grid[1])
    figure, axes = make_panels(len(images), count + 1, images.shape[3] / images.shape[2])
    for b, (row, image, caption) in enumerate(zip(axes, images.cpu(), captions, strict=True)):
        row[0].imshow(image.permute(1, 2, 0).numpy())
        for axis, s in zip(row[1:], shown, strict=False):
            merged = merged_image(image, found[s][b].cpu().view(grid))
            axis.imshow(merged.permute(1, 2, 0).numpy())
        write_caption(row[-1], caption)
    axes[0, 0].set_title("image", fontsize=9)
    for axis, s in zip(axes[0, 1:], shown, strict=False):
        left = (found[s][0].unique() >= 0).sum().item()
        axis.set_title(f"after layer {infos[s].stage.first + 1}:\n{left} tokens", fontsize=9)
    return save_figure(figure, path, title=title, note=NOTE)
