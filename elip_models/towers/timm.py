"""Towers of timm's VisionTransformer, plain or like CLIP (pre-norm, QuickGELU, LayerScale).

Uses patch_embed, _pos_embed, patch_drop, norm_pre, blocks (norm1, attn, ls1, drop_path1, and the
same of the second half) and norm.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from timm.layers import Attention, PatchEmbed
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from elip_models.towers.base import Tower
from elip_models.towers.tower_parts import Projections, interpolated, plain_mlp_ratio
from elip_models.towers.unsupported import timm_reason
from elip_models.towers.wrapped_modules import Affine, is_plain, qkv_of, refuses_norm, unwrapped

PATCH_DROP = (
    "it has patch dropout of its own, so patches have no position (create it with "
    "patch_drop_rate=0, and reduce it by strategy='patch_dropout')"
)
ANY_SIZE = (
    "dynamic_img_size=True in timm.create_model takes any, the model's set_input_size another"
)


class PlainTimm(Tower):
    """The attributes that timm's plain transformers share, with any pooling."""

    size_advice = ANY_SIZE
    dense_methods = ("forward_intermediates",)
    unsupported_methods = ("prune_intermediate_layers",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = model.blocks
        self.width = model.embed_dim
        self.depth = len(model.blocks)
        self.num_heads = model.blocks[0].attn.num_heads
        self.num_prefix_tokens = model.num_prefix_tokens
        self.has_cls = model.cls_token is not None
        self.mlp_ratio = plain_mlp_ratio(self.width, model.blocks[0].mlp)

    @property
    def num_patches(self) -> int:
        """Return the current number, which `set_input_size` changes."""
        return self.model.patch_embed.num_patches

    @property
    def image_size(self) -> tuple[int, int]:
        """Return the current image size, which `set_input_size` changes."""
        return tuple(self.model.patch_embed.img_size)

    @property
    def has_dynamic_size(self) -> bool:
        """Return whether the model was created with dynamic_img_size=True."""
        return self.model.dynamic_img_size

    @property
    def pools(self) -> bool:
        """Return whether the model pools now; `reset_classifier` changes it."""
        return self.model.global_pool not in ("token", "")

    def image_stats(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Return the statistics of a model that timm created by name, or None."""
        config = getattr(self.model, "pretrained_cfg", None)
        return (tuple(config["mean"]), tuple(config["std"])) if config else None

    @property
    def checkpointing(self) -> bool:
        """Return whether the model's own forward checkpoints the activations of its blocks."""
        return self.model.grad_checkpointing

    def attention_dropout(self, i: int) -> float:
        """Return the current dropout rate of block i's attention weights."""
        attn = self._attention(i)
        return attn.attn_drop.p if attn.training else 0.0

    def finish(self, tokens: Tensor) -> Tensor:
        """Run the final norm, before pooling."""
        return self.model.norm(tokens)

    @property
    def entrance(self) -> list[tuple[nn.Module, str]]:
        """Return the owners and names of the methods that embed images, in call order."""
        return [(self.model.patch_embed, "forward"), (self.model, "_pos_embed")]

    def refuses_resizing(self) -> str | None:
        """Return why the image size cannot change, in one sentence, or None if it can."""
        embed = self.model.patch_embed
        if isinstance(embed, PatchEmbed):
            return None
        return f"its patches come from a {type(embed).__name__} and not from one convolution"

    def patchify(self, images: Tensor) -> Tensor:
        """Return what `entrance` makes of images (B, 3, h, w), with interpolated positions."""
        model = self.model
        patches = model.patch_embed.proj(images)
        grid = tuple(patches.shape[2:])
        tokens = model.patch_embed.norm(rearrange(patches, "b d h w -> b (h w) d"))
        p = 0 if model.no_embed_class else self.num_prefix_tokens
        positions = 0.0
        if model.pos_embed is not None:
            positions = interpolated(model.pos_embed[0], model.patch_embed.grid_size, grid, p)
        names = ("cls_token", "dist_token", "reg_token")
        first = [t for name in names if (t := getattr(model, name, None)) is not None]
        first = [t.expand(images.shape[0], -1, -1) for t in first]
        if model.no_embed_class:
            tokens = torch.cat([*first, tokens + positions], dim=1)
        else:
            tokens = torch.cat([*first, tokens], dim=1) + positions
        return model.pos_drop(tokens)


class TimmTower(PlainTimm):
    """A VisionTransformer of timm; CLS, distillation and register tokens stay."""

    def __init__(self, model: vit.VisionTransformer) -> None:
        super().__init__(model)
        self.absorbs_keys = self.has_cls

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Return why the model cannot be a tower, in one sentence, or None if it can."""
        if not isinstance(model, vit.VisionTransformer):
            return timm_reason(model)
        if getattr(model.patch_drop, "prob", 0.0) > 0:
            return PATCH_DROP
        reasons = (refuses_block(block) for block in model.blocks)
        return next((reason for reason in reasons if reason is not None), None)

    def enter(self, tokens: Tensor) -> Tensor:
        """Run the modules between `entrance` and block 0."""
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before block 0 of images (B, 3, H, W)."""
        return self.enter(self.model._pos_embed(self.model.patch_embed(images)))

    def qkv(self, i: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return block i's queries, keys and values (B, H, N, d) of tokens before its norm."""
        attn = self._attention(i)
        qkv = attn.qkv(self.blocks[i].norm1(tokens))
        q, k, v = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=attn.num_heads)
        return attn.q_norm(q), attn.k_norm(k), v

    def projections(self, i: int) -> Projections:
        """Return the modules around block i's projections."""
        attn = self._attention(i)
        norms = (None if isinstance(n, nn.Identity) else n for n in (attn.q_norm, attn.k_norm))
        return Projections(unwrapped(self.blocks[i].norm1), attn.num_heads, attn.scale, *norms)

    def weights(self, i: int) -> list[Affine] | None:
        """Return block i's query, key and value projections, each (D, D) as in nn.Linear."""
        return qkv_of(self._attention(i).qkv)

    def project(self, i: int, attended: Tensor) -> Tensor:
        """Return what block i adds to the tokens, from its attention's output (B, N, D)."""
        block, attn = self.blocks[i], self._attention(i)
        return block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(attended)))))

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        """Run block i's MLP half, residual included."""
        block = self.blocks[i]
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def is_plain(self, i: int) -> bool:
        """Return whether block i runs only its own parts, in eval mode, so `cls_block` is exact."""
        block = self.blocks[i]
        own = type(block) is vit.Block and type(unwrapped(block.attn)) is Attention
        return own and refuses_block(block) is None and is_plain(block)

    def _attention(self, i: int) -> nn.Module:
        """Return block i's attention, which may have been wrapped since the tower was made."""
        attn = unwrapped(self.blocks[i].attn)
        if not isinstance(attn, Attention):
            raise TypeError(
                f"model: expected blocks of timm's Attention, got a {type(attn).__name__} in block "
                f"{i}; wrap its projections instead, or unreduce_ the model first"
            )
        return attn


def refuses_block(block: nn.Module) -> str | None:
    """Return why a block cannot be read, in one sentence, or None if it can."""
    if not isinstance(block, vit.Block):
        return f"its blocks are {type(block).__name__} (parallel or post-norm), not pre-norm Block"
    attn = unwrapped(block.attn)
    if not isinstance(attn, Attention):
        return f"its attention is {type(attn).__name__} and not timm's plain Attention"
    if getattr(attn, "gate", None) is not None:
        return "it gates its attention output"
    return refuses_norm(block.norm1)
