"""Towers of timm whose attention adds a bias for each pair of positions: BEiT and its like.

    a_nm = q_n . k_m / sqrt(d) + bias(position of n, position of m)

A kept token keeps its position, also if others merge into it: rows and columns of the bias are
those of the positions that are left. A token that is made of all dropped ones has no position, and
no bias.
"""

from typing import Any, Self

import torch
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from elip_models.towers.timm import BLOCK, PlainTimm
from elip_models.towers.tower_data import per_sublayer
from elip_models.towers.tower_parts import Block, run
from elip_models.towers.wrapped_modules import library_class, refuses_norm

MODELS = (beit.Beit, relpos.VisionTransformerRelPos)
BLOCKS = (beit.Block, relpos.RelPosBlock)


class BiasTower(PlainTimm):
    """A Beit or a VisionTransformerRelPos of timm; a class token stays.

    shared_bias: the bias of all blocks in this forward pass, if it is known already.
    argument: the name by which the model passes it to a block.
    """

    attentions = (beit.Attention, relpos.RelPosAttention)
    absorbs_keys = False
    shared_bias: Tensor | None = None
    has_dynamic_size = False
    adds_bias = True
    size_advice = "the model's set_input_size takes others"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.is_beit = isinstance(model, beit.Beit)
        self.argument = "shared_rel_pos_bias" if self.is_beit else "shared_rel_pos"
        if self.is_beit:
            self.names = BLOCK._replace(after=per_sublayer("gamma_{}", "drop_path{}"))

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        return isinstance(model, MODELS)

    @classmethod
    def refuses_block(cls, block: nn.Module) -> str | None:
        if library_class(block) not in BLOCKS:
            return f"its blocks are {type(block).__name__} (post-norm), not pre-norm"
        return super().refuses_block(block) or refuses_norm(block.norm1)

    def refuses_resizing(self) -> str | None:
        return "the bias of its attention is that of one image size"

    def embed(self, images: Tensor) -> Tensor:
        model, tokens = self.model, self.model.patch_embed(images)
        if model.cls_token is not None:
            tokens = torch.cat([model.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        positions = getattr(model, "pos_embed", None)
        tokens = tokens if positions is None else tokens + positions
        return run(model, ["pos_drop"], tokens)

    def resized_for(self, images: Tensor) -> Self:
        return self.changed(shared_bias=self._shared_bias())

    def from_block_kwargs(self, i: int, kwargs: dict[str, Any]) -> Self:
        return self.changed(shared_bias=kwargs.get(self.argument))

    def position_bias(self, i: int) -> Tensor | None:
        parts = [own for own in (self._own_bias(i), self._shared_bias()) if own is not None]
        if not parts:
            return None
        bias = sum(parts[1:], start=parts[0])
        bias = bias if bias.dim() == 4 else bias[None]  # of all blocks, where BEiT has no batch
        return bias if self.positions is None else self.bias_at(bias, self.positions)

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        return block(tokens, **{self.argument: self._shared_bias()})

    def _own_bias(self, i: int) -> Tensor | None:
        attn = self._attention(i)
        if self.is_beit:
            table = attn.relative_position_bias_table
            return None if table is None else table[attn.relative_position_index].permute(2, 0, 1)
        return None if attn.rel_pos is None else attn.rel_pos.get_bias()

    def _shared_bias(self) -> Tensor | None:
        if self.shared_bias is not None:
            return self.shared_bias
        if self.is_beit:
            return None if self.model.rel_pos_bias is None else self.model.rel_pos_bias()
        shared = self.model.shared_rel_pos
        return None if shared is None else shared.get_bias()
