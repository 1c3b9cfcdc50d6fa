"""The positions of patches in towers of transformers, read from the models' own modules.

DINOv3 rotates the patches, MLCD the class token too, and the attention of V-JEPA 2 computes its
rotations from the indices of all tokens; BEiT and Data2Vec add a bias. See `eva.py` for a token
without a position.
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.towers.base import Tower
from elip_models.towers.positions import angles_at, coordinates_of
from elip_models.towers.tower_parts import part


class HFPositions(Tower):
    """The part of a tower of transformers that gives its layers the positions of their tokens.

    trunk: the module that has the embeddings and the config.
    rotations: cos and sin (N0, d) of all patches in this forward pass, in a rotary tower; of all
        tokens if `rotates_prefix`.
    resolution: the images' size (H, W) in this forward pass, in a tower that adds a bias.
    rotates_itself: the attention computes its rotations from the indices of all patches.
    """

    trunk: nn.Module
    rotations: tuple[Tensor, Tensor] | None = None
    resolution: tuple[int, int] | None = None
    rotates_itself: bool = False

    @property
    def rotates_prefix(self) -> bool:
        """Return whether class tokens are rotated too; no layer takes rotations of each image."""
        return hasattr(self.trunk, "class_pos_emb")

    @property
    def adds_bias(self) -> bool:
        """Return whether layers add a bias to their attention for each pair of positions."""
        return part(self.blocks[0], self.names.bias) is not None

    @property
    def is_rotary(self) -> bool:
        """Return whether layers rotate queries and keys by the position of their patch."""
        rotates_patches = hasattr(self.trunk, "rope_embeddings")
        return rotates_patches or self.rotates_itself or self.rotates_prefix

    @property
    def reads_own_positions(self) -> bool:
        return self.adds_bias or self.rotates_itself or self.rotates_prefix

    def resized_for(self, images: Tensor) -> Self:
        if self.adds_bias:
            return self.changed(resolution=tuple(images.shape[2:]))
        if not self.is_rotary or self.rotates_itself:
            return self
        return self.changed(rotations=self._tables(images))

    def from_block_kwargs(self, i: int, kwargs: dict[str, Any]) -> Self:
        if self.adds_bias:
            return self.changed(resolution=kwargs.get("resolution"))
        rotations = kwargs.get("position_embeddings")
        return self if rotations is None else self.changed(rotations=rotations)

    def block_kwargs_at(self, kwargs: dict[str, Any], positions: Tensor) -> dict[str, Any]:
        return kwargs | {
            "position_embeddings": self.from_block_kwargs(0, kwargs)
            .with_positions(positions)
            ._rotations()
        }

    def rotated(self, i: int, heads: Tensor) -> Tensor:
        if not self.is_rotary:
            return heads
        if self.rotates_itself:
            return self._rotated_by_attention(i, heads)
        cos, sin = self._rotations()
        fixed = 0 if self.rotates_prefix else self.num_prefix_tokens
        first, others = heads.tensor_split([fixed], dim=2)
        one, other = others.chunk(2, dim=-1)
        turned = others * cos + torch.cat([-other, one], dim=-1) * sin
        return torch.cat([first, turned.type_as(heads)], dim=2)

    def position_bias(self, i: int) -> Tensor | None:
        own = part(self.blocks[i], self.names.bias)
        if own is None:
            return None
        rows, columns = pair(self.trunk.config.patch_size)
        height, width = self.resolution or self.image_size
        bias = own((height // rows, width // columns))
        return bias if self.positions is None else self.bias_at(bias, self.positions)

    def _rotated_by_attention(self, i: int, heads: Tensor) -> Tensor:
        """Rotate block i's queries or keys (B, H, N, d) as its attention does."""
        attn, positions = self._attention(i), self.positions
        turned = attn.apply_rotary_embeddings(
            heads, attn.get_position_ids(heads[:, 0], masks=positions)
        )
        if positions is None:
            return turned
        return torch.where((positions < 0)[:, None, :, None], heads, turned)

    def _rotations(self) -> tuple[Tensor, Tensor]:
        """Return cos and sin of these tokens: `rotations`, or (B, 1, N-p or N, d) at positions."""
        tables = self.rotations
        if tables is None:
            weight = next(self.trunk.parameters())
            tables = self._tables(weight.new_empty(1, 3, *self.image_size))
        if self.positions is None:
            return tables
        if not self.gathered and self.positions.dim() == 3:
            angles = angles_at(self.positions[:, None], self._frequencies, half=True)
            self.gathered[0] = angles.cos().to(tables[0]), angles.sin().to(tables[0])
        elif not self.gathered:
            none = (1.0, 0.0)  # of a token without a position, the last row
            padded = [F.pad(t, (0, 0, 0, 1), value=v) for t, v in zip(tables, none, strict=True)]
            places = self.places(self.positions) if self.rotates_prefix else self.positions
            self.gathered[0] = tuple(table[places].unsqueeze(1) for table in padded)
        return self.gathered[0]

    def refuses_mean_positions(self) -> str | None:
        has_known = hasattr(self.trunk, "rope_embeddings")
        return None if has_known else super().refuses_mean_positions()

    def coordinates(self) -> Tensor:
        cos, sin = self.with_positions(None)._rotations()
        return coordinates_of(sin, cos, self._frequencies, half=True)

    @property
    def _frequencies(self) -> Tensor:
        """Return the frequencies of each axis, the lowest last, of DINOv3."""
        return math.tau * self.trunk.rope_embeddings.inv_freq

    def _tables(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of images (B, 3, H, W), see `rotations`."""
        trunk = self.trunk
        if not self.rotates_prefix:
            return trunk.rope_embeddings(images)
        rows, columns = pair(trunk.config.patch_size)
        grid = torch.cartesian_prod(
            torch.arange(images.shape[2] // rows, device=images.device),
            torch.arange(images.shape[3] // columns, device=images.device),
        )
        cos, sin = trunk.vision_rotary_embedding(images, grid)
        first = trunk.class_pos_emb.repeat(1, 2)
        return torch.cat([first.cos(), cos]), torch.cat([first.sin(), sin])


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a size in a config."""
    return (size, size) if isinstance(size, int) else tuple(size)
