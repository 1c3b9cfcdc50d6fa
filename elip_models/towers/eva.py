"""Towers of timm's Eva: EVA, EVA-02, rotary ViTs (`vit_*_rope`), DINOv3, Perception Encoder.

Uses patch_embed, _pos_embed, norm_pre, rope, blocks (norm1, attn, gamma_1, drop_path1, and the same
of the MLP sublayer) and norm. With r_n the rotation of the position of token n:

    q_n, k_n = r_n q_norm(W_q norm(x_n)), r_n k_norm(W_k norm(x_n))      r = 1 for prefix tokens

A kept token keeps its rotation in all later blocks, also if others merge into it. A token that is
made of all dropped ones has no position: its rotation is the identity (sin 0, cos 1), as for CLS. A
CLS row projects the keys, because a rotation cannot fold into the query.
"""

import math
from typing import Any, Self

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    build_rotary_pos_embed,
    get_mixed_freqs,
    get_mixed_grid,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from elip_models.towers.positions import angles_at, coordinates_of
from elip_models.towers.timm import BLOCK, PlainTimm
from elip_models.towers.tower_data import QKV, per_sublayer
from elip_models.towers.tower_parts import Block
from elip_models.towers.wrapped_modules import library_class


class EvaTower(PlainTimm):
    """An Eva of timm; CLS and register tokens stay.

    is_mixed: blocks have different rotations.
    ropes: the rotations of all patches in this forward pass, if they are known already; those of
        one block by its number if blocks differ and the model has passed them.
    """

    attentions = (EvaAttention, AttentionRope)
    absorbs_keys = False
    averages_keys = False
    ropes: Tensor | dict[int, Tensor] | None = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        attn = self._attention(0)
        qkv = BLOCK.qkv if attn.qkv is not None else ("q_proj", "k_proj", "v_proj")
        self.names = BLOCK._replace(qkv=qkv, after=per_sublayer("gamma_{}", "drop_path{}"))
        self.is_rotary = model.rope is not None
        self.is_mixed = self.is_rotary and getattr(model, "rope_mixed", False)
        self.rotates_halves = attn.rotate_half
        if self.is_mixed:
            self.size_advice = "the model's set_input_size takes others"

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        return isinstance(model, Eva)

    @classmethod
    def refuses(cls, model: nn.Module) -> str | None:
        is_mixed = model.rope is not None and getattr(model, "rope_mixed", False)
        if is_mixed and model.dynamic_img_size:
            return (
                "each block has its own rotations, which change from call to call with the image's "
                "size (create it with dynamic_img_size=False; set_input_size changes the size then)"
            )
        if is_mixed and getattr(model.rope, "aug_active", False):
            return "it draws each block's rotations anew in every training step"
        return super().refuses(model)

    @classmethod
    def refuses_block(cls, block: nn.Module) -> str | None:
        if library_class(block) is not EvaBlock:
            return f"its blocks are {type(block).__name__} (post-norm), not pre-norm EvaBlock"
        return super().refuses_block(block)

    def with_positions(self, positions: Tensor | None) -> Self:
        if not self.is_rotary:
            return self
        ropes = self._ropes() if self.ropes is None else self.ropes
        return self.changed(positions=positions, ropes=ropes)

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of an image."""
        return self.model.patch_embed.dynamic_feat_size(image_size)

    def resized_for(self, images: Tensor) -> Self:
        if not self.is_rotary:
            return self
        return self.changed(ropes=self._ropes(self.grid_of(images.shape[2:])))

    def from_block_kwargs(self, i: int, kwargs: dict[str, Any]) -> Self:
        rope = kwargs.get("rope")
        if rope is None:
            return self
        return self.changed(ropes={i: rope} if self.is_mixed else rope)

    def block_kwargs_at(self, kwargs: dict[str, Any], positions: Tensor) -> dict[str, Any]:
        return kwargs | {"rope": self.rotations_at(kwargs["rope"], positions)}

    def rotations_at(self, rope: Tensor, positions: Tensor) -> Tensor:
        """Return the rotations (B, 1 or H, N-p, 2d) at `positions`.

        rope: (N0, 2d) or (H, N0, 2d), of all patches.
        """
        rope = rope[None] if rope.dim() == 2 else rope
        return self.with_none(rope)[:, positions].transpose(0, 1)

    def refuses_mean_positions(self) -> str | None:
        rope = self.model.rope
        is_index = isinstance(rope, RotaryEmbeddingCat) and not rope.in_pixels
        if is_index or isinstance(rope, (RotaryEmbeddingDinoV3, RotaryEmbeddingMixed)):
            return None
        return super().refuses_mean_positions()

    def coordinates(self) -> Tensor:
        rope, table = self.model.rope, self.ropes
        if self.is_mixed:
            size, indexing = list(self.grid_of(self.image_size)), rope.grid_indexing
            grid = get_mixed_grid(size, grid_indexing=indexing, device=rope.freqs.device)
            return torch.stack(grid, dim=1).double()
        table = self._ropes() if table is None else table
        sin, cos = (table[:, 0] if table.dim() == 4 else table).chunk(2, -1)
        return coordinates_of(sin, cos, self._frequencies, half=rope.rotate_half)

    @property
    def _frequencies(self) -> Tensor:
        """Return the frequencies of each axis, the lowest last."""
        rope = self.model.rope
        is_dinov3 = isinstance(rope, RotaryEmbeddingDinoV3)
        return math.tau / rope.periods if is_dinov3 else rope.bands

    def _rotations(self, coordinates: Tensor, i: int) -> Tensor:
        """Return the rotations (B, 1 or H, N, 2d) of block i at coordinates (B, N, 2)."""
        rope, coordinates = self.model.rope, coordinates[:, None]
        if self.is_mixed:
            return get_mixed_freqs(rope.freqs[:, i], *coordinates.unbind(-1))
        angles = angles_at(coordinates, self._frequencies, half=rope.rotate_half)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    @staticmethod
    def with_none(rope: Tensor) -> Tensor:
        """Return rotations (.., N0, 2d) with one row more, of a token without a position."""
        none = torch.zeros_like(rope[..., :1, :])
        none[..., rope.shape[-1] // 2 :] = 1  # sin 0, cos 1
        return torch.cat([rope, none], dim=-2)

    def patchify(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens and rotations of images (B, 3, h, w), with interpolated positions."""
        return super().patchify(images), self.resized_for(images).ropes

    def enter(self, tokens: tuple[Tensor, Tensor | None]) -> Tensor:
        return super().enter(tokens[0])

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        return block(tokens, rope=self._rope(i))

    def rotated(self, i: int, heads: Tensor) -> Tensor:
        rope, p = self._rope(i), self.num_prefix_tokens
        if rope is None:
            return heads
        rotated = apply_rot_embed_cat(heads[:, :, p:], rope, half=self.rotates_halves)
        return torch.cat([heads[:, :, :p], rotated], dim=2)

    def qkv(self, i: int, tokens: Tensor) -> QKV:
        q, k, v = super().qkv(i, tokens)
        return q.type_as(v), k.type_as(v), v

    def _ropes(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the rotations of all patches: (N0, 2d), or (depth, H, N0, 2d) if blocks differ."""
        rope, own = self.model.rope, self.grid_of(self.image_size)
        grid = own if grid is None else grid
        if self.has_dynamic_size or not hasattr(rope, "feat_shape"):
            return rope.get_embed(shape=grid)
        if grid == own:
            return rope.get_embed()
        if isinstance(rope, RotaryEmbeddingCat):  # which stores those of one size
            names = ("bands", "in_pixels", "ref_feat_shape", "grid_offset", "grid_indexing")
            names += ("rotate_half", "grid_type", "normalize_coords")
            settings = {name: getattr(rope, name) for name in names}
            embeds = build_rotary_pos_embed(grid, **settings, dtype=rope.pos_embed.dtype)
            return torch.cat(embeds, dim=-1)
        return rope.get_embed(shape=grid)

    def _rope(self, i: int) -> Tensor | None:
        """Return the rotations of block i for these tokens."""
        if not self.is_rotary:
            return None
        ropes = self.ropes
        if ropes is None or (isinstance(ropes, dict) and i not in ropes):
            ropes = self._ropes()
        rope = ropes[i] if self.is_mixed else ropes
        if self.positions is None:
            return rope
        block = i if self.is_mixed else 0
        if block not in self.gathered:  # by queries and by keys
            at = self.positions
            rope = self.rotations_at(rope, at) if at.dim() == 2 else self._rotations(at, i)
            self.gathered[block] = rope
        return self.gathered[block]
