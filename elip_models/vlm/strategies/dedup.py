"""Remove patches that repeat a neighbour or the background, before the image tower.

A unit is the square of patches that becomes one token, such as 2x2 in Qwen-VL.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from elip_models.validation import NonNegative
from elip_models.vlm.families import PATCH_ARGUMENTS, Multimodal
from elip_models.vlm.strategies.base import LanguageStrategy

INTERPOLATION = "get_vision_interpolation_indices_and_weights"


@dataclass(frozen=True)
class Dedup(LanguageStrategy):
    """Remove redundant patches of documents and screens.

    The background of a frame has, for each colour channel, the most frequent value of the first
    pixels of its units. Of the units with this content, the first stays. Another unit goes if it
    equals the kept unit that its left or upper neighbour is, or repeats. The last unit of a frame
    stays, as under every strategy. How many tokens stay depends on the image, so there is no
    `keep`.

    Attributes:
        tolerance: the largest absolute difference of normalised pixel values within which two
            contents are the same; 0 for equal ones.
    """

    name: ClassVar[str] = "dedup"
    place: ClassVar[str] = "before the image tower"
    summary: ClassVar[str] = "removes patches that repeat a neighbour or the background"
    keep: ClassVar[None] = None

    tolerance: NonNegative = 0.1

    def why_unsupported(self, multimodal: Multimodal) -> str | None:
        if multimodal.config.model_type not in PATCH_ARGUMENTS:
            return (
                "its image tower needs every patch: it makes their positions in its embeddings, or "
                "joins them, by the grid of the whole image"
            )
        from transformers import vision_utils

        has_grid = getattr(multimodal.tower.config, "num_position_embeddings", None) is not None
        if has_grid and not hasattr(vision_utils, INTERPOLATION):
            return f"it needs a later transformers, which has `vision_utils.{INTERPOLATION}`"
        return super().why_unsupported(multimodal)

    def count(self, length: int, keep: None = None) -> int:
        """Return `length`: all tokens of an image without repetition stay."""
        return length

    def select(self, units: Tensor, grid: Tensor) -> Tensor:
        """Return which units stay.

        Args:
            units: (U, P, C, V) normalised pixels of all images: P patches of V values for each of
                C channels. The units of a frame are in raster order.
            grid: (R, 3) int64, frames, rows and columns of units of each image or clip.

        Returns:
            (U,) bool.
        """
        places, device = _Places.of(grid), units.device
        corners = units[:, 0, :, 0].split(places.lengths)
        background = torch.cat([c.mode(0).values.expand(len(c), -1) for c in corners])
        is_plain = self._is_same(units, background[:, None, :, None])
        is_first = torch.cat([p & (p.cumsum(0) == 1) for p in is_plain.split(places.lengths)])
        own = torch.arange(len(units), device=device)
        source = torch.cat((own.where(is_first | ~is_plain, -1), own.new_tensor([-1])))
        neighbours, is_content = places.neighbours.to(device), ~is_plain.cpu()
        for diagonal in places.diagonals:
            index = diagonal[is_content[diagonal]].to(device)
            for neighbour in neighbours[:, index]:
                kept = source[neighbour]
                is_repeated = (kept >= 0) & self._is_same(units[index], units[kept])
                source[index] = kept.where(is_repeated & (source[index] == index), source[index])
        stays = source[:-1] == own
        stays[places.last.to(device)] = True
        return stays

    def _is_same(self, units: Tensor, others: Tensor) -> Tensor:
        return (units - others).abs().amax((1, 2, 3)) <= self.tolerance


class _Places(NamedTuple):
    """Where the units of images are, as int64 indices of units on the CPU.

    lengths: the number of units of each frame.
    last: (F,) the last unit of each frame.
    neighbours: (2, U) the left and the upper neighbour of each unit, or -1.
    diagonals: the units of all frames with the same sum of row and column, ascending. The
        neighbours of a unit are on the diagonal before.
    """

    lengths: list[int]
    last: Tensor
    neighbours: Tensor
    diagonals: tuple[Tensor, ...]

    @classmethod
    def of(cls, grid: Tensor) -> Self:
        """Return the places of the units of images with this grid (R, 3)."""
        sizes = [size for frames, *size in grid.tolist() for _ in range(frames)]
        lengths = [rows * columns for rows, columns in sizes]
        row = torch.cat([torch.arange(r).repeat_interleave(c) for r, c in sizes])
        column = torch.cat([torch.arange(c).repeat(r) for r, c in sizes])
        widths = torch.tensor([c for _, c in sizes]).repeat_interleave(torch.tensor(lengths))
        unit = torch.arange(len(row))
        order = (row + column).argsort(stable=True)
        left, above = (unit - 1).where(column > 0, -1), (unit - widths).where(row > 0, -1)
        return cls(
            lengths,
            last=torch.tensor(lengths).cumsum(0) - 1,
            neighbours=torch.stack((left, above)),
            diagonals=order.split((row + column).bincount().tolist()),
        )
