"""open_clip's VisionTransformer as a tower, and its CLIP as an image-text model.

Uses _embeds, transformer.resblocks (ln_1, attn, ls_1 and the second half alike), ln_post, proj.
Attention is nn.MultiheadAttention or open_clip's own of the same parameter names: what a block has
decides, not the version.
"""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from einops import rearrange
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn

from elip_models.towers.base import Projections, Tower, optional
from elip_models.towers.effective_weights import (
    Affine,
    affine,
    in_projection,
    is_lora_attention,
    is_plain,
    out_projection,
    refuses_norm,
    unwrapped,
)
from elip_models.towers.fsdp import unsharded
from elip_models.towers.image_text import ImageTextModel
from elip_models.towers.positions import interpolated
from elip_models.towers.reducible_model import Stats, clip_stats, random_ids

LIBRARIES = ("torch", "open_clip")  # whose attention is read; a wrapper's is not


class OpenClipTower(Tower):
    """An open_clip VisionTransformer, by whatever pooling."""

    dense_methods = ("forward_intermediates",)
    unsupported_methods = ("prune_intermediate_layers",)

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self.blocks = model.transformer.resblocks
        self.width = model.transformer.width
        self.depth = len(self.blocks)
        self.num_heads = self.blocks[0].attn.num_heads
        self.num_patches = model.grid_size[0] * model.grid_size[1]
        self.image_size = tuple(model.image_size)
        self.pools = model.attn_pool is not None or model.pool_type == "avg"
        self.mlp_ratio = self.blocks[0].mlp.c_fc.out_features / self.width

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        if not isinstance(model, VisionTransformer):
            return (
                f"its image tower is a {type(model).__name__} and not open_clip's "
                "VisionTransformer, nor a trunk of timm"
            )
        if isinstance(model.patch_dropout, PatchDropout) and model.patch_dropout.prob > 0:
            return "it has patch dropout of its own, so patches have no position"
        if not model.transformer.batch_first:
            return "its blocks take (N, B, D) tokens (batch_first=False)"
        reasons = (_refuses_block(block) for block in model.transformer.resblocks)
        return next((reason for reason in reasons if reason is not None), None)

    def image_stats(self) -> Stats | None:
        return _stats_of(self.model)

    @property
    def checkpointing(self) -> bool:
        return self.model.transformer.grad_checkpointing

    @property
    def entrance(self) -> list[tuple[nn.Module, str]]:
        return [(self.model, "_embeds")]

    def patchify(self, images: Tensor) -> Tensor:
        model = self.model
        patches = model.conv1(images)
        grid = tuple(patches.shape[2:])
        cls = model.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
        tokens = torch.cat([cls, rearrange(patches, "b d h w -> b (h w) d")], dim=1)
        positions = interpolated(model.positional_embedding, model.grid_size, grid, 1)
        return model.ln_pre(tokens + positions.to(tokens.dtype))

    def enter(self, tokens: Tensor) -> Tensor:
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        return self.model._embeds(images)

    def qkv(self, i: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self._attention(i)
        qkv = in_projection(attn)(self.blocks[i].ln_1(tokens))
        q, k, v = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        return optional(attn, "ln_q")(q), optional(attn, "ln_k")(k), v

    def projections(self, i: int) -> Projections:
        attn = self._attention(i)
        norms = (optional(attn, name) for name in ("ln_q", "ln_k"))
        norms = (None if isinstance(norm, nn.Identity) else norm for norm in norms)
        scale = (self.width // self.num_heads) ** -0.5
        return Projections(unwrapped(self.blocks[i].ln_1), self.num_heads, scale, *norms)

    def weights(self, i: int) -> list[Affine]:
        attn = self._attention(i)
        if not is_lora_attention(attn):
            return in_projection(attn).thirds()
        with torch.no_grad():
            return in_projection(attn).thirds()

    def attention_dropout(self, i: int) -> float:
        attn = _inner(self._attention(i))
        if not attn.training:
            return 0.0
        return attn.dropout if isinstance(attn, nn.MultiheadAttention) else attn.attn_drop.p

    def project(self, i: int, attended: Tensor) -> Tensor:
        block, attn = self.blocks[i], self._attention(i)
        out = out_projection(attn, optional(attn, "ln_inner")(attended))
        return block.ls_1(optional(block, "ln_attn")(optional(attn, "out_drop")(out)))

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        block = self.blocks[i]
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def is_plain(self, i: int) -> bool:
        block = self.blocks[i]
        return _refuses_block(block) is None and is_plain(block)

    def finish(self, tokens: Tensor) -> Tensor:
        model = self.model
        pools_by_attention = model.attn_pool is not None and model.attn_pool_contrastive is None
        is_behind = pools_by_attention or (self.pools and model.final_ln_after_pool)
        return tokens if is_behind else model.ln_post(tokens)

    def _attention(self, i: int) -> nn.Module:
        """Block i's attention now: a wrapper may have come since the tower was made."""
        attn = unwrapped(self.blocks[i].attn)
        reason = _refuses_attention(attn)
        if reason is not None:
            raise TypeError(f"model: expected open_clip's own attention in block {i}, but {reason}")
        return attn


class OpenClipImageText(ImageTextModel):
    """A whole open_clip CLIP or CoCa: the text features of a CLIP guide its image tower, where they
    are as wide or its projection maps them back.
    """

    def __init__(self, model: CLIP | CustomTextCLIP | CoCa) -> None:
        self.model = model
        self.image_model = model.visual

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        return isinstance(model, (CLIP, CustomTextCLIP, CoCa))

    def refuses(self) -> str | None:
        if getattr(self.image_model, "attn_pool", None) is not None:
            return "its image tower pools into the width of its text, with no projection to go back"
        layers = _layers_behind(self.image_model)
        if layers is None or len(layers) > 1 or any(affine(layer) is None for layer in layers):
            return "its image tower has no linear projection to go back through"
        return None

    def text_cls(self, image: Tensor | None = None, text: Any = None) -> Tensor | None:
        return self.encode_guidance(text) if self.pair(image, text) else None

    def encode_guidance(self, text: Tensor) -> Tensor:
        features = self.model.encode_text(text, normalize=True)
        with unsharded(self.image_model, features) as (features,):
            if isinstance(self.image_model, VisionTransformer):
                return features @ self.image_model.proj.T
            for layer in _layers_behind(self.image_model):
                features = features @ affine(layer).weight
            return features

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        length, vocab_size = self.model.context_length, self.model.vocab_size
        return {"image": images, "text": random_ids(images, length, vocab_size, vocab_size - 1)}

    def image_stats(self) -> Stats:
        return _stats_of(self.image_model) or clip_stats()

    def load_tokenizer(self, name: str) -> Any:
        """By 'NAME' or 'NAME/TAG' of open_clip."""
        return open_clip.get_tokenizer(name.partition("/")[0])

    def tokenise(self, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"text": tokenizer(list(captions))}


def _layers_behind(visual: nn.Module) -> list[nn.Module] | None:
    """What maps pooled tokens of timm to text features in a CLIP; None where it is unknown."""
    if isinstance(visual, VisionTransformer):
        return None if visual.proj is None else []
    if not isinstance(visual, TimmModel):
        return None
    layers = (visual.trunk.get_classifier(), *visual.head)
    return [layer for layer in layers if not isinstance(layer, (nn.Identity, nn.Dropout))]


def _stats_of(visual: nn.Module) -> Stats | None:
    """What open_clip notes on an image tower that it creates by name; None of another."""
    mean, std = (getattr(visual, name, None) for name in ("image_mean", "image_std"))
    return None if mean is None else (tuple(mean), tuple(std))


def _inner(attn: nn.Module) -> nn.Module:
    """The attention inside LoRA's."""
    return attn.get_base_layer() if is_lora_attention(attn) else attn


def _refuses_attention(attn: nn.Module) -> str | None:
    inner = _inner(attn)
    if type(inner).__module__.split(".")[0] not in LIBRARIES:
        return f"its attention is {type(attn).__name__}, a wrapper whose weights only it knows"
    if getattr(inner, "in_proj_weight", None) is None:
        return f"its attention ({type(attn).__name__}) has no in_proj_weight of q, k and v together"
    is_torch, out = isinstance(inner, nn.MultiheadAttention), inner.out_proj
    if is_torch and inner is attn and not isinstance(out, nn.Linear):
        return (
            f"torch's attention reads the weight of its out_proj, and so ignores the "
            f"{type(out).__name__} around it (adapt the attention itself)"
        )
    return None


def _refuses_block(block: nn.Module) -> str | None:
    if getattr(block, "ln_1_kv", None) is not None:
        return "its blocks attend to other tokens than their own"
    attn = unwrapped(block.attn)
    if _refuses_attention(attn) is not None:
        return _refuses_attention(attn)
    if getattr(attn, "logit_scale", None) is not None:
        return "it attends by scaled cosine, whose scale is learned"
    if getattr(attn, "head_scale", None) is not None:
        return "it scales the output of each head"
    return refuses_norm(block.ln_1)
