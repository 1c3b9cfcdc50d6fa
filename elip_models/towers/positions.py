"""The positions of tokens, for towers whose blocks read them: rotary ones, and those with a bias.

    rotary:  q_n, k_n = r(position of n) q_n, k_n
    bias:    a_nm = q_n . k_m / sqrt(d) + bias(position of n, position of m)

A kept token keeps its position, also if others merge into it. With position='mean', a merged
token of a rotary tower has the mean coordinates of its patches. With f the frequencies of an axis:

    angles = [f x_a for each axis a]            of a token at the coordinates x
    x_a    = angle of a known f, over f         so the model's own rotations give the coordinates
"""

import math
from copy import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

import elip_kernels
from elip_kernels import BipartiteInfo, ReductionInfo
from elip_models.towers.tower_parts import NO_POSITION, TowerParts


class PositionedTower(TowerParts):
    """The part of a tower that gives the positions of its tokens to blocks that read them.

    gathered: the rotations at `positions`, once they are known: by block if blocks differ, else 0.
    """

    gathered: dict[int, Any]

    def with_positions(self, positions: Tensor | None) -> Self:
        """Return the tower for tokens at these positions; None means all patches in order.

        Only a tower that `has_positions` reads them.
        """
        return self.changed(positions=positions) if self.has_positions else self

    def changed(self, **attributes: Any) -> Self:
        """Return the tower of the same model with other attributes, and nothing gathered."""
        tower = copy(self)
        for name, value in (attributes | {"gathered": {}}).items():
            setattr(tower, name, value)
        return tower

    def resized_for(self, images: Tensor) -> Self:
        """Return the tower for a forward pass of images (B, 3, H, W), whose size may be another."""
        return self

    def from_block_kwargs(self, i: int, kwargs: dict[str, Any]) -> Self:
        """Return the tower for a forward pass whose model calls block i with `kwargs`."""
        return self

    def at_no_position(self) -> Self:
        """Return the tower for one token that comes from outside the image."""
        if not self.has_positions:
            return self
        positions = torch.full((1, max(0, 1 - self.num_prefix_tokens)), NO_POSITION)
        return self.with_positions(positions.to(next(self.blocks[0].parameters()).device))

    def positions_of(self, kept: Tensor) -> Tensor | None:
        """Return the positions of the patches at the indices `kept` (B, K) among the tokens.

        None if blocks need none.
        """
        if not self.has_positions:
            return None
        kept = kept - self.num_prefix_tokens
        return kept if self.positions is None else self.positions.gather(1, kept)

    def positions_after(self, reduction: ReductionInfo) -> Tensor | None:
        """Return the positions of the tokens that a reduction leaves; None if blocks need none."""
        positions = self.positions_of(reduction.kept)
        if positions is None or not reduction.merged:
            return positions
        return F.pad(positions, (0, 1), value=NO_POSITION)

    def refuses_mean_positions(self) -> str | None:
        """Return why a token cannot be between patches, in one sentence, or None if it can."""
        return "no rotation of its blocks is computed from coordinates of patches"

    def coordinates(self) -> Tensor:
        """Return the coordinates (N0, 2), or (B, N0, 2), of all patches; see `mean_positions`."""
        raise NotImplementedError

    def mean_positions(
        self, match: BipartiteInfo, sizes: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return the coordinates (B, R-p, 2) of the patches after a merge: means by size.

        `sizes` (B, N) are those before it, and `dtype` that of the sums. The tower may be at such
        coordinates, as at positions.
        """
        B, p, at = match.slots.shape[0], self.num_prefix_tokens, self.positions
        if at is None or at.dim() == 2:
            table = self.coordinates().to(dtype).expand(B, -1, -1)
            at = table if at is None else table.gather(1, at[..., None].expand(-1, -1, 2))
        return elip_kernels.apply_merge(F.pad(at, (0, 0, p, 0)), match, size=sizes)[0][:, p:]

    def block_kwargs_at(self, kwargs: dict[str, Any], positions: Tensor) -> dict[str, Any]:
        """Return the model's keyword arguments of a block, for the tokens at `positions`."""
        return kwargs

    def places(self, positions: Tensor) -> Tensor:
        """Return the rows (B, N) of tokens at `positions` in a table of all tokens; -1 stays."""
        p, B = self.num_prefix_tokens, positions.shape[0]
        first = torch.arange(p, device=positions.device).expand(B, -1)
        return torch.cat([first, torch.where(positions < 0, positions, positions + p)], dim=1)

    def bias_at(self, bias: Tensor, positions: Tensor) -> Tensor:
        """Return the bias (B, H, N, N) at `positions`, of that of all tokens (1, H, N0, N0)."""
        places = self.places(positions)
        bias = F.pad(bias[0], (0, 1, 0, 1))  # the last row and column, of a token without position
        return bias[:, places[:, :, None], places[:, None]].transpose(0, 1)


def interpolated(positions: Tensor, grid: tuple[int, int], to: tuple[int, int], p: int) -> Tensor:
    """Resize position embeddings (p + rows * columns, D) from one grid of patches to another.

    The embeddings of the p prefix tokens stay.
    """
    if grid == to:
        return positions
    at_least_fp32 = torch.promote_types(positions.dtype, torch.float32)
    table = positions[p:].to(at_least_fp32).unflatten(0, grid).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=to, mode="bicubic", antialias=True, align_corners=False)
    table = table[0].flatten(1).T.to(positions.dtype)
    return torch.cat([positions[:p], table])


def coordinates_of(sin: Tensor, cos: Tensor, frequencies: Tensor, *, half: bool) -> Tensor:
    """Return the coordinates (.., N, 2) of rotations (.., N, d).

    The lowest frequency tells the number of turns of the highest, which is more accurate.

    frequencies: (d / 4,) of each axis, the lowest last.
    half: the channels of a frequency are in two halves, not side by side.
    """
    n, coordinates = len(frequencies), 0.0
    for k in (n - 1, 0):
        channels = [k, n + k] if half else [2 * k, 2 * (n + k)]
        angles = torch.atan2(sin[..., channels].double(), cos[..., channels].double())
        turns = ((coordinates * frequencies[k] - angles) / math.tau).round()
        coordinates = (angles + math.tau * turns) / frequencies[k]
    return coordinates


def angles_at(coordinates: Tensor, frequencies: Tensor, *, half: bool) -> Tensor:
    """Return the angles (.., N, d) of rotations at coordinates (.., N, 2), in fp32."""
    angles = (coordinates[..., None] * frequencies).flatten(-2).float()
    return angles.repeat(*[1] * (angles.dim() - 1), 2) if half else angles.repeat_interleave(2, -1)
