"""Pictures of merging: the patches of one token in their mean colour, with an outline.

token_s(n) = the token that contains patch n after step s, by the source maps of all steps   (B, P)
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_models.analysis.visualize import GREY, Panel, draw_panels, source_maps
from elip_models.strategies.strategy import StageInfo

MAX_FRAMES = 16  # in the picture of a clip, evenly spaced
MAX_STEPS = 4  # steps in a picture, evenly spaced up to the last one
PIXELS = 256  # smallest height of an image, so that an outline is thin
NOTE = (
    "The patches of one token have their mean colour, and may be in separate areas; patches that "
    "were not merged are unchanged; dropped patches are grey. Numbers are without prefix tokens."
)

OF_CLIPS = "A token may be in several frames."


def tokens_of_patches(infos: Sequence[StageInfo], num_patches: int) -> list[Tensor]:
    """Return for each step (B, num_patches) int64: the token of each patch, -1 if dropped."""
    tokens = []
    for source in source_maps(infos, num_patches)[1:]:
        holds, token = source.to(torch.uint8).max(1)
        tokens.append(token.masked_fill(holds == 0, -1))
    return tokens


def merged_image(image: Tensor, tokens: Tensor) -> Tensor:
    """Return a picture (3, s H, s W) of the patches that form one token, at least `PIXELS` high.

    `image` is (3, H, W) in [0, 1], `tokens` (rows, columns) one item of `tokens_of_patches`.
    """
    return merged_clip(image[None], tokens[None])[0]


def merged_clip(frames: Tensor, tokens: Tensor) -> Tensor:
    """Return pictures (T, 3, s H, s W) of the patches that form one token, over space and time.

    `frames` is (T, 3, H, W) in [0, 1], `tokens` (steps, rows, columns) one item of
    `tokens_of_patches`, with T / steps frames per step.
    """
    scale = max(1, -(-PIXELS // frames.shape[2]))
    frames = frames.repeat_interleave(scale, 2).repeat_interleave(scale, 3).transpose(0, 1)
    wide = F.interpolate(tokens[:, None].float(), size=frames.shape[2:])[:, 0].long()
    wide = wide.repeat_interleave(frames.shape[1] // len(tokens), 0)
    values, counts = tokens.unique(return_counts=True)
    for token, count in zip(values.tolist(), counts.tolist(), strict=True):
        if token < 0:
            frames[:, wide == token] = GREY
        elif count > 1:
            inside = wide == token
            frames[:, inside] = frames[:, inside].mean(1, keepdim=True)
    edge = torch.zeros_like(wide, dtype=torch.bool)
    edge[..., 1:] |= wide[..., 1:] != wide[..., :-1]
    edge[:, 1:] |= wide[:, 1:] != wide[:, :-1]
    return frames.masked_fill(edge, 0.0).transpose(0, 1)


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
    tokens = tokens_of_patches(infos, grid[0] * grid[1])
    rows = []
    for b, image in enumerate(images.cpu()):
        merged = (merged_image(image, tokens[s][b].cpu().view(grid)) for s in shown)
        rows.append([Panel(picture.permute(1, 2, 0)) for picture in (image, *merged)])
    titles = ["image"]
    for s in shown:
        left = (tokens[s][0].unique() >= 0).sum().item()
        titles.append(f"after layer {infos[s].stage.first + 1}:\n{left} tokens")
    return draw_panels(rows, captions, path, titles=titles, title=title, note=NOTE)


def draw_clips(
    clips: Tensor,
    captions: Sequence[str],
    infos: Sequence[StageInfo],
    path: Path,
    *,
    grid: tuple[int, int, int],
    title: str = "",
) -> Path:
    """Write a PNG with two rows for each clip: its frames, and tokens after the last layer.

    The clips are (B, T, 3, H, W) in [0, 1], `grid` has the steps in time, the rows and the columns
    of the patches. Other arguments are those of `draw_reduction`.
    """
    B, T = clips.shape[:2]
    last = tokens_of_patches(infos, math.prod(grid))[-1].cpu().view(B, *grid)
    count = min(MAX_FRAMES, T)
    shown = [round(k * (T - 1) / max(count - 1, 1)) for k in range(count)]
    rows, texts = [], []
    for clip, tokens, caption in zip(clips.cpu(), last, captions, strict=True):
        for frames in (clip, merged_clip(clip, tokens)):
            rows.append([Panel(frames[t].permute(1, 2, 0)) for t in shown])
        left = (tokens.unique() >= 0).sum().item()
        texts += [caption, f"{left} tokens of {tokens.numel()}"]
    titles = [f"frame {t + 1}" for t in shown]
    return draw_panels(rows, texts, path, titles=titles, title=title, note=f"{NOTE} {OF_CLIPS}")
