"""Towers of timm's NaFlexVit, whose batches hold patches of images of different sizes.

Uses embeds, _forward_embeds, norm_pre, blocks (those of `timm.py`) and norm. A batch is a dict of
`patches`, `patch_coord` and `patch_valid`, or images (B, 3, H, W) of one size.
"""

import math

from timm.models import naflexvit
from torch import Tensor, nn

from elip_models.towers.timm import PATCH_DROP, TimmTower, refuses_block
from elip_models.towers.tower_parts import plain_mlp_ratio


class NaFlexTower(TimmTower):
    """A NaFlexVit of timm; class token and registers stay."""

    has_dynamic_size = True
    takes_padding = True
    size_advice = "images (B, 3, H, W) of a batch have one size"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = model.blocks
        self.width = model.embed_dim
        self.depth = len(model.blocks)
        self.num_heads = model.blocks[0].attn.num_heads
        self.num_prefix_tokens = model.num_prefix_tokens
        self.has_cls = self.absorbs_keys = model.has_class_token
        self.mlp_ratio = plain_mlp_ratio(self.width, model.blocks[0].mlp)

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """Return whether this adapter handles the model, if its library has several adapters."""
        return isinstance(model, naflexvit.NaFlexVit)

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Return why the model cannot be a tower, in one sentence, or None if it can."""
        if model.rope is not None:
            return (
                "it rotates patches by their place in each image's own grid, which no adapter reads"
            )
        if model.patch_drop is not None:
            return PATCH_DROP
        reasons = (refuses_block(block) for block in model.blocks)
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def image_size(self) -> tuple[int, int]:
        """Return the size of images whose patches are those of the position embeddings' grid."""
        rows, columns = self.model.embeds.patch_size
        height, width = self.model.embeds.pos_embed_grid_size or (14, 14)
        return height * rows, width * columns

    @property
    def num_patches(self) -> int:
        """Return the number of patches of an image of that size."""
        return math.prod(self.model.embeds.dynamic_feat_size(self.image_size))

    def refuses_resizing(self) -> str | None:
        """Return why the image size cannot change, in one sentence, or None if it can."""
        return "it takes images of any size; pass smaller ones"

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before block 0 of images (B, 3, H, W)."""
        return self.model._forward_embeds(images, None, None, None)["patches"]
