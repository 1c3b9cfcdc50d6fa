"""Towers of timm's VisionTransformer, plain or like CLIP (pre-norm, QuickGELU, LayerScale).

Uses patch_embed, _pos_embed, norm_pre, blocks (norm1, attn, ls1, drop_path1, and the
same of the MLP sublayer) and norm.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention, PatchEmbed
from timm.models import vision_transformer as vit
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from elip_models.towers.base import Tower
from elip_models.towers.positions import interpolated
from elip_models.towers.tower_data import Affine, BlockNames, per_sublayer, plain_mlp_ratio
from elip_models.towers.tower_parts import unwrapped
from elip_models.towers.unsupported import timm_reason
from elip_models.towers.wrapped_modules import library_class, refuses_norm

MODELS = (vit.VisionTransformer, NaFlexVit)  # whose blocks are of the class Block
BLOCK = BlockNames(
    attn="attn",
    norm1="norm1",
    norm2="norm2",
    norm="norm",
    out=("norm", "proj", "proj_drop"),
    after=per_sublayer("ls{}", "drop_path{}"),
    qkv=("qkv",),
    dropout=("attn_drop",),
)
PATCH_DROP = (
    "it has patch dropout of its own, so patches have no position (create it with "
    "patch_drop_rate=0, and reduce it by strategy='patch_dropout')"
)
ANY_SIZE = (
    "dynamic_img_size=True in timm.create_model takes any, the model's set_input_size another"
)


class PlainTimm(Tower):
    """What timm's plain transformers share, with any pooling.

    attentions: the classes of attention that are read.
    has_joint_bias: the bias of q, k and v belongs to the attention, not to its layer.
    """

    attentions: tuple[type[nn.Module], ...]
    names = BLOCK
    size_advice = ANY_SIZE
    dense_methods = ("forward_intermediates",)
    unsupported_methods = ("prune_intermediate_layers",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = model.blocks
        self.width = model.embed_dim
        self.depth = len(model.blocks)
        self.num_heads = model.blocks[0].attn.num_heads
        self.scale = model.blocks[0].attn.scale
        self.has_joint_bias = getattr(model.blocks[0].attn, "q_bias", None) is not None
        self.num_prefix_tokens = model.num_prefix_tokens
        self.has_cls = getattr(model, "cls_token", None) is not None
        self.mlp_ratio = plain_mlp_ratio(self.width, model.blocks[0].mlp)

    @classmethod
    def refuses(cls, model: nn.Module) -> str | None:
        drops = getattr(getattr(model, "patch_drop", None), "prob", 0.0) > 0
        return PATCH_DROP if drops else cls.refuses_blocks(model.blocks)

    @classmethod
    def refuses_block(cls, block: nn.Module) -> str | None:
        attn = unwrapped(block.attn)
        if cls.refuses_attention(attn) is not None:
            return cls.refuses_attention(attn)
        if getattr(attn, "gate", None) is not None:
            return "it gates its attention output"
        if getattr(attn, "num_kv_groups", 1) > 1:
            return "several heads share a key (grouped-query attention)"
        return None

    @classmethod
    def refuses_attention(cls, attn: nn.Module) -> str | None:
        if library_class(attn) not in cls.attentions:
            kind = type(attn).__name__
            return f"its attention is {kind}, a wrapper (wrap its projections instead)"
        is_joint = getattr(attn, "q_bias", None) is not None and not attn.qkv_bias_separate
        if is_joint and not isinstance(attn.qkv, nn.Linear):
            return (
                f"timm reads the weight of its qkv, and so ignores the {type(attn.qkv).__name__} "
                "around it (qkv_bias_separate=True calls it)"
            )
        return None

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
        return self.model.grad_checkpointing

    def projected(self, attn: nn.Module, x: Tensor) -> Tensor | list[Tensor]:
        if not self.has_joint_bias:
            return super().projected(attn, x)
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)

    def weights(self, i: int) -> list[Affine] | None:
        maps = super().weights(i)
        if maps is None or not self.has_joint_bias:
            return maps
        attn = self._attention(i)
        biases = (attn.q_bias, attn.k_bias, attn.v_bias)
        return [Affine(known.weight, bias) for known, bias in zip(maps, biases, strict=True)]

    def finish(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    @property
    def embed_methods(self) -> list[tuple[nn.Module, str]]:
        return [(self.model.patch_embed, "forward"), (self.model, "_pos_embed")]

    def enter(self, tokens: Tensor) -> Tensor:
        return self.model.norm_pre(tokens)

    def embed(self, images: Tensor) -> Tensor:
        return self.enter(self.model._pos_embed(self.model.patch_embed(images)))

    def refuses_resizing(self) -> str | None:
        embed = self.model.patch_embed
        if isinstance(embed, PatchEmbed):
            return None
        return f"its patches come from a {type(embed).__name__} and not from one convolution"

    def patchify(self, images: Tensor) -> Tensor:
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

    @property
    def absorbs_keys(self) -> bool:
        """Return whether a row is computed without a key projection of the tokens."""
        return self.has_cls

    @classmethod
    def refuses(cls, model: nn.Module) -> str | None:
        return super().refuses(model) if isinstance(model, MODELS) else timm_reason(model)

    @classmethod
    def refuses_block(cls, block: nn.Module) -> str | None:
        if not isinstance(block, vit.Block):
            kind = type(block).__name__
            return f"its blocks are {kind} (parallel or post-norm), not pre-norm Block"
        return super().refuses_block(block) or refuses_norm(block.norm1)

    @classmethod
    def refuses_attention(cls, attn: nn.Module) -> str | None:
        if isinstance(attn, Attention):
            return None
        return f"its attention is {type(attn).__name__} and not timm's plain Attention"

    def is_plain(self, i: int) -> bool:
        block = self.blocks[i]
        own = type(block) is vit.Block and type(unwrapped(block.attn)) is Attention
        return own and super().is_plain(i)
