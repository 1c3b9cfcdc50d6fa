"""The positions of a prompt in M-RoPE (time, row, column) whose images have fewer tokens.

The remaining tokens keep the positions that they have in the whole prompt. Those of text are known
before an image is encoded. Which image tokens stay is known only afterwards, so that the prompt
first has the position of the image's first token for all of them:

    whole prompt       T  I00 I01 I10 I11  T     kept: I00, I11
    before encoding    0   1   1            3    `prompt_positions`
    offset             -  00  11            -    `grid_offsets`, added in the forward pass

The offsets travel with the features of the image, through vLLM's cache of encoder outputs, as
further columns. Each number is two digits of base 128, which every floating-point dtype stores
exactly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 128
COLUMNS = 6
"""The columns that `encode_offsets` returns."""


def whole_starts(starts: Sequence[int], kept: Sequence[int], whole: Sequence[int]) -> list[int]:
    """Return where images begin in the whole prompt.

    Args:
        starts: where they begin in the prompt with fewer tokens, ascending.
        kept: how many tokens each image has there.
        whole: how many tokens it has in the whole prompt.
    """
    moved, shift = [], 0
    for start, few, many in zip(starts, kept, whole, strict=True):
        moved.append(start + shift)
        shift += many - few
    return moved


def prompt_positions(
    positions: Tensor, starts: Sequence[int], kept: Sequence[int], whole: Sequence[int]
) -> Tensor:
    """Return (3, M) int64, the positions of a prompt before its images are encoded.

    Args:
        positions: (3, N) int64 of the whole prompt.
        starts: where images begin in it, ascending.
        kept: how many tokens of each image stay.
        whole: how many tokens each image has.
    """
    parts, end = [], 0
    for start, few, many in zip(starts, kept, whole, strict=True):
        parts += [positions[:, end:start], positions[:, start, None].expand(-1, few)]
        end = start + many
    return torch.cat((*parts, positions[:, end:]), 1)


def grid_offsets(frames: int, rows: int, columns: int, time_step: float = 1.0) -> Tensor:
    """Return (3, n) int64, the offsets of the n tokens of a clip or an image from the first one.

    `time_step` is the distance of two frames in positions; times are rounded down.
    """
    times = (torch.arange(frames, dtype=torch.float64) * time_step).long()
    return torch.cartesian_prod(times, torch.arange(rows), torch.arange(columns)).T


def encode_offsets(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return offsets (3, k), from 0 to 16,383, as (k, 6) digits of a floating-point dtype."""
    return torch.stack((offsets // BASE, offsets % BASE)).flatten(0, 1).T.to(dtype)


def decode_offsets(digits: Tensor) -> Tensor:
    """Return the offsets (3, k) int64 of digits (k, 6)."""
    high, low = digits.long().T.unflatten(0, (2, 3))
    return high * BASE + low
