"""Towers of timm's NaFlexVit, whose batches hold patches of images of different sizes.

Uses embeds, norm_pre, rope, blocks (those of `timm.py`, or those of `eva.py`) and
norm. A batch is a dict of `patches`, `patch_coord` and `patch_valid`, or images (B, 3, H, W) of one
size. The rotations of a dict are those of each image's own grid, (B, 1, N0, 2d).
"""

import math

from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from elip_models.towers.eva import EvaTower
from elip_models.towers.timm import PlainTimm, TimmTower


class NaFlexSizes(PlainTimm):
    """The sizes and the embedding of a NaFlexVit; class token and registers stay."""

    has_dynamic_size = True
    takes_padding = True
    size_advice = "images (B, 3, H, W) of a batch have one size"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.has_cls = model.has_class_token

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        return isinstance(model, NaFlexVit)

    @property
    def image_size(self) -> tuple[int, int]:
        """Return the size of images whose patches are those of the position embeddings' grid."""
        rows, columns = self.model.embeds.patch_size
        height, width = self.model.embeds.pos_embed_grid_size or (14, 14)
        return height * rows, width * columns

    @property
    def num_patches(self) -> int:
        """Return the number of patches of an image of that size."""
        return math.prod(self.grid_of(self.image_size))

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of an image."""
        return self.model.embeds.dynamic_feat_size(image_size)

    @property
    def embed_methods(self) -> list[tuple[nn.Module, str]]:
        """Return no method: none is replaced, since the image size cannot change."""
        return []

    def refuses_resizing(self) -> str | None:
        return "it takes images of any size; pass smaller ones"

    def embed(self, images: Tensor) -> Tensor:
        tokens, _grid = self.model.embeds(images)
        return self.model.norm_pre(tokens)


class NaFlexTower(NaFlexSizes, TimmTower):
    """A NaFlexVit of plain blocks."""


class RotaryNaFlexTower(NaFlexSizes, EvaTower):
    """A NaFlexVit of EVA's blocks, which may rotate patches by their place in each image."""

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        return isinstance(model, NaFlexVit) and isinstance(model.blocks[0], EvaBlock)

    @classmethod
    def refuses(cls, model: nn.Module) -> str | None:
        if model.rope_is_mixed:
            return "each block has its own rotations, which change with the sizes of the images"
        return super().refuses(model)

    def rotations_at(self, rope: Tensor, positions: Tensor) -> Tensor:
        """Return the rotations (B, 1, N-p, 2d) at `positions`.

        rope: (N0, 2d), or (B, 1, N0, 2d) with those of each image.
        """
        if rope.dim() == 2:
            return super().rotations_at(rope, positions)
        table = self.with_none(rope)
        index = positions.expand(len(rope), -1) % table.shape[2]  # of -1, the last row
        return table.gather(2, index[:, None, :, None].expand(-1, -1, -1, table.shape[3]))
