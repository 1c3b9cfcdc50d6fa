"""Towers of timm whose attention adds a bias for each pair of positions: BEiT and its like.

    a_nm = q_n . k_m / sqrt(d) + bias(position of n, position of m)

A kept token keeps its position, also if others merge into it: rows and columns of the bias are
those of the positions that are left. A token that is made of all dropped ones has no position, and
no bias.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from elip_models.towers.timm import PlainTimm
from elip_models.towers.tower_parts import IDENTITY, Block, Projections
from elip_models.towers.wrapped_modules import (
    Affine,
    affine,
    is_plain,
    library_class,
    qkv_of,
    refuses_norm,
    unwrapped,
)

MODELS = (beit.Beit, relpos.VisionTransformerRelPos)
BLOCKS = (beit.Block, relpos.RelPosBlock)
ATTENTIONS = (beit.Attention, relpos.RelPosAttention)


class BiasTower(PlainTimm):
    """A Beit or a VisionTransformerRelPos of timm; a class token stays.

    shared_bias: the bias of all blocks in this forward pass, if it is known already.
    """

    absorbs_keys = False
    shared_bias: Tensor | None = None
    has_dynamic_size = False
    adds_bias = True
    size_advice = "the model's set_input_size takes others"

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """Return whether this adapter handles the model, if its library has several adapters."""
        return isinstance(model, MODELS)

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Return why the model cannot be a tower, in one sentence, or None if it can."""
        reasons = (_refuses_block(block) for block in model.blocks)
        return next((reason for reason in reasons if reason is not None), None)

    def refuses_resizing(self) -> str | None:
        """Return why the image size cannot change, in one sentence, or None if it can."""
        return "the bias of its attention is that of one image size"

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before block 0 of images (B, 3, H, W)."""
        model, tokens = self.model, self.model.patch_embed(images)
        if model.cls_token is not None:
            tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        positions = getattr(model, "pos_embed", None)
        tokens = tokens if positions is None else tokens + positions
        return getattr(model, "pos_drop", IDENTITY)(tokens)

    def for_images(self, images: Tensor) -> Self:
        """Return the tower for a forward pass of images (B, 3, H, W), whose bias it stores."""
        return self.changed(shared_bias=self._shared_bias())

    def in_call(self, i: int, kwargs: dict[str, Any]) -> Self:
        """Return the tower for a forward pass whose model calls block i with `kwargs`."""
        name = "shared_rel_pos_bias" if isinstance(self.model, beit.Beit) else "shared_rel_pos"
        return self.changed(shared_bias=kwargs.get(name))

    def position_bias(self, i: int) -> Tensor | None:
        """Return what block i adds to its attention scores, (1 or B, H, N, N), or None."""
        parts = [own for own in (self._own_bias(i), self._shared_bias()) if own is not None]
        if not parts:
            return None
        bias = sum(parts[1:], start=parts[0])
        bias = bias if bias.dim() == 4 else bias[None]  # of all blocks, where BEiT has no batch
        return bias if self.positions is None else self.bias_at(bias, self.positions)

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        """Call block i, or its forward alone, with the arguments that its model passes."""
        shared = self._shared_bias()
        if isinstance(self.model, beit.Beit):
            return block(tokens, shared_rel_pos_bias=shared)
        return block(tokens, shared_rel_pos=shared)

    def qkv(self, i: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return block i's queries, keys and values (B, H, N, d) of tokens before its norm."""
        attn, x = self._attention(i), self.blocks[i].norm1(tokens)
        bias = _joint_bias(attn)
        if bias is None:
            qkv = attn.qkv(x)
        elif attn.qkv_bias_separate:
            qkv = attn.qkv(x) + bias
        else:
            qkv = F.linear(x, attn.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=attn.num_heads)
        return getattr(attn, "q_norm", IDENTITY)(q), getattr(attn, "k_norm", IDENTITY)(k), v

    def projections(self, i: int) -> Projections:
        """Return the modules around block i's projections."""
        attn = self._attention(i)
        each = (getattr(attn, name, IDENTITY) for name in ("q_norm", "k_norm"))
        norms = (None if isinstance(norm, nn.Identity) else norm for norm in each)
        return Projections(unwrapped(self.blocks[i].norm1), attn.num_heads, attn.scale, *norms)

    def weights(self, i: int) -> list[Affine] | None:
        """Return block i's query, key and value projections, each (D, D) as in nn.Linear."""
        attn = self._attention(i)
        bias = _joint_bias(attn)
        if bias is None:
            return qkv_of(attn.qkv)
        joint = affine(attn.qkv)
        return None if joint is None else joint._replace(bias=bias).thirds()

    def project(self, i: int, attended: Tensor) -> Tensor:
        """Return what block i adds to the tokens, from its attention's output (B, N, D)."""
        attn = self._attention(i)
        return self._residual(i, 1, attn.proj_drop(attn.proj(attended)))

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        """Run block i's MLP half, residual included."""
        block = self.blocks[i]
        return tokens + self._residual(i, 2, block.mlp(block.norm2(tokens)))

    def is_plain(self, i: int) -> bool:
        """Return whether block i runs only its own parts, in eval mode, so `cls_block` is exact."""
        return _refuses_block(self.blocks[i]) is None and is_plain(self.blocks[i])

    def _residual(self, i: int, half: int, out: Tensor) -> Tensor:
        """Run what is between the output of block i's half 1 or 2 and its residual."""
        block = self.blocks[i]
        gamma = getattr(block, f"gamma_{half}", None)
        out = out if gamma is None else gamma * out
        out = getattr(block, f"ls{half}", IDENTITY)(out)
        return getattr(block, f"drop_path{half}")(out)

    def _own_bias(self, i: int) -> Tensor | None:
        attn = self._attention(i)
        if isinstance(attn, beit.Attention):
            has_table = attn.relative_position_bias_table is not None
            return attn._get_rel_pos_bias() if has_table else None
        return None if attn.rel_pos is None else attn.rel_pos.get_bias()

    def _shared_bias(self) -> Tensor | None:
        if self.shared_bias is not None:
            return self.shared_bias
        if isinstance(self.model, beit.Beit):
            return None if self.model.rel_pos_bias is None else self.model.rel_pos_bias()
        shared = self.model.shared_rel_pos
        return None if shared is None else shared.get_bias()

    def _attention(self, i: int) -> nn.Module:
        """Return block i's attention, which may have been wrapped since the tower was made."""
        attn = unwrapped(self.blocks[i].attn)
        if library_class(attn) not in ATTENTIONS:
            raise TypeError(
                f"model: expected timm's own attention in block {i}, got a {type(attn).__name__}; "
                "wrap its projections instead, or unreduce_ the model first"
            )
        return attn


def _joint_bias(attn: nn.Module) -> Tensor | None:
    """Return the joint bias of q, k and v if it belongs to the attention, not to its layer."""
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _refuses_block(block: nn.Module) -> str | None:
    if library_class(block) not in BLOCKS:
        return f"its blocks are {type(block).__name__} (post-norm), not pre-norm"
    attn = unwrapped(block.attn)
    if library_class(attn) not in ATTENTIONS:
        return f"its attention is {type(attn).__name__}, a wrapper (wrap its projections instead)"
    return refuses_norm(block.norm1)
