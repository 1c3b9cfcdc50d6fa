"""Towers of open_clip's VisionTransformer, and its CLIP and CoCa as language-image models.

Uses _embeds, transformer.resblocks (ln_1, attn, ls_1, and the same of the MLP sublayer), ln_post
and proj. Attention is nn.MultiheadAttention, or open_clip's own class with the same names of
parameters.
"""

import re
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from einops import rearrange
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn

from elip_models.images import CLIP_STATS, Stats
from elip_models.towers.base import Tower
from elip_models.towers.lora import in_projection, is_lora_attention, out_projection
from elip_models.towers.positions import interpolated
from elip_models.towers.reducible_model import ImageTextModel, default_stats, random_ids
from elip_models.towers.tower_data import Affine, BlockNames
from elip_models.towers.tower_parts import run, unwrapped
from elip_models.towers.wrapped_modules import affine, refuses_norm, thirds, unsharded

BLOCK = BlockNames(
    attn="attn",
    norm1="ln_1",
    norm2="ln_2",
    norm="ln_post",
    out=("out_proj",),
    after=(("ln_attn", "ls_1"), ("ls_2",)),
    head_norms=("ln_q", "ln_k"),
    dropout=("dropout", "attn_drop"),
)
LIBRARIES = ("torch", "open_clip")  # of attention classes whose weights are read


class OpenClipTower(Tower):
    """A VisionTransformer of open_clip, with any pooling."""

    names = BLOCK
    dense_methods = ("forward_intermediates",)
    unsupported_methods = ("prune_intermediate_layers",)

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self.blocks = model.transformer.resblocks
        self.width = model.transformer.width
        self.depth = len(self.blocks)
        self.num_heads = self.blocks[0].attn.num_heads
        self.scale = (self.width // self.num_heads) ** -0.5
        self.num_patches = model.grid_size[0] * model.grid_size[1]
        self.image_size = tuple(model.image_size)
        self.pools = model.attn_pool is not None or model.pool_type == "avg"
        self.mlp_ratio = self.blocks[0].mlp.c_fc.out_features / self.width

    @classmethod
    def refuses(cls, model: nn.Module) -> str | None:
        if not isinstance(model, VisionTransformer):
            return (
                f"its image tower is a {type(model).__name__} and not open_clip's "
                "VisionTransformer, nor a trunk of timm; take a ViT, such as 'ViT-B-32'"
            )
        if isinstance(model.patch_dropout, PatchDropout) and model.patch_dropout.prob > 0:
            return "it has patch dropout of its own, so patches have no position"
        if not model.transformer.batch_first:
            return "its blocks take (N, B, D) tokens (batch_first=False)"
        return cls.refuses_blocks(model.transformer.resblocks)

    @classmethod
    def refuses_block(cls, block: nn.Module) -> str | None:
        if getattr(block, "ln_1_kv", None) is not None:
            return "its blocks attend to other tokens than their own"
        attn = unwrapped(block.attn)
        if cls.refuses_attention(attn) is not None:
            return cls.refuses_attention(attn)
        if getattr(attn, "logit_scale", None) is not None:
            return "it attends by scaled cosine, whose scale is learned"
        if getattr(attn, "head_scale", None) is not None:
            return "it scales the output of each head"
        return refuses_norm(block.ln_1)

    @classmethod
    def refuses_attention(cls, attn: nn.Module) -> str | None:
        kind = type(attn).__name__
        inner = attn.get_base_layer() if is_lora_attention(attn) else attn
        if type(inner).__module__.split(".")[0] not in LIBRARIES:
            return f"its attention is {kind}, a wrapper, whose weights cannot be read"
        if getattr(inner, "in_proj_weight", None) is None:
            return f"its attention ({kind}) has no in_proj_weight of q, k and v together"
        is_torch, out = isinstance(inner, nn.MultiheadAttention), inner.out_proj
        if is_torch and inner is attn and not isinstance(out, nn.Linear):
            return (
                f"torch's attention reads the weight of its out_proj, and so ignores the "
                f"{type(out).__name__} around it (adapt the attention itself)"
            )
        return None

    def image_stats(self) -> Stats | None:
        return _stats_of(self.model)

    @property
    def checkpointing(self) -> bool:
        return self.model.transformer.grad_checkpointing

    @property
    def embed_methods(self) -> list[tuple[nn.Module, str]]:
        return [(self.model, "_embeds")]

    def patchify(self, images: Tensor) -> Tensor:
        model = self.model
        patches = model.conv1(images)
        grid = tuple(patches.shape[2:])
        cls = model.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
        tokens = torch.cat([cls, rearrange(patches, "b d h w -> b (h w) d")], dim=1)
        positions = interpolated(model.positional_embedding, model.grid_size, grid, 1)
        return model.ln_pre(tokens + positions.to(tokens.dtype))

    def embed(self, images: Tensor) -> Tensor:
        return self.patchify(images)

    def projected(self, attn: nn.Module, x: Tensor) -> Tensor:
        return in_projection(attn)(x)

    def weights(self, i: int) -> list[Affine]:
        attn = self._attention(i)
        if not is_lora_attention(attn):
            return thirds(in_projection(attn))
        with torch.no_grad():
            return thirds(in_projection(attn))

    def project(self, i: int, attended: Tensor) -> Tensor:
        attn = self._attention(i)
        out = out_projection(attn, run(attn, ["ln_inner"], attended))
        return run(self.blocks[i], BLOCK.after[0], run(attn, ["out_drop"], out))

    def finish(self, tokens: Tensor) -> Tensor:
        model = self.model
        pools_by_attention = model.attn_pool is not None and model.attn_pool_contrastive is None
        is_behind = pools_by_attention or (self.pools and model.final_ln_after_pool)
        return tokens if is_behind else model.ln_post(tokens)


class OpenClipImageText(ImageTextModel):
    """A CLIP or CoCa of open_clip.

    CLIP's text features guide its image tower if they are as wide, or if its projection maps them
    back.
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

    def images_and_text(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        return image, {"text": text}

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
        stats = _stats_of(self.image_model)
        return stats or default_stats(self.image_model, "CLIP", CLIP_STATS)

    def load_tokenizer(self, name: str) -> Any:
        """Return the tokenizer of 'NAME', 'NAME:TAG', 'NAME/TAG' or 'local-dir:FOLDER'."""
        is_elsewhere = name.startswith(("local-dir:", "hf-hub:"))
        return open_clip.get_tokenizer(name if is_elsewhere else re.split("[:/]", name)[0])

    def tokenise(self, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"text": tokenizer(list(captions))}


def _layers_behind(visual: nn.Module) -> list[nn.Module] | None:
    """Return the layers from pooled tokens of timm to text features; None if unknown."""
    if isinstance(visual, VisionTransformer):
        return None if visual.proj is None else []
    if not isinstance(visual, TimmModel):
        return None
    layers = (visual.trunk.get_classifier(), *visual.head)
    return [layer for layer in layers if not isinstance(layer, (nn.Identity, nn.Dropout))]


def _stats_of(visual: nn.Module) -> Stats | None:
    """Return the statistics that open_clip stores on a tower created by name, or None."""
    mean, std = (getattr(visual, name, None) for name in ("image_mean", "image_std"))
    return None if mean is None else (tuple(mean), tuple(std))
