"""timm's VisionTransformer as a tower, plain and CLIP-like (pre-norm, QuickGELU, LayerScale).

Uses patch_embed, _pos_embed, patch_drop, norm_pre, blocks (norm1, attn, ls1, drop_path1 and the
second half alike) and norm.
"""

import torch
from timm.layers import Attention
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from elip_kernels import (
    ReductionInfo,
    cls_attend_from_tokens,
    cls_attention_from_tokens,
    score_reduce,
)


class TimmTower:
    """A timm VisionTransformer with CLS pooling (or none) and pre-norm blocks."""

    side_doors = (
        "forward_intermediates",
        "get_intermediate_layers",
        "prune_intermediate_layers",
        "set_input_size",
        "reset_classifier",
    )

    def __init__(self, model: vit.VisionTransformer) -> None:
        self.model = model
        self.blocks = model.blocks
        self.width = model.embed_dim
        self.depth = len(model.blocks)
        self.num_patches = model.patch_embed.num_patches
        self.image_size = tuple(model.patch_embed.img_size)
        self.mlp_ratio = model.blocks[0].mlp.fc1.out_features / self.width

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Why the model cannot be a tower, in one sentence, or None."""
        if not isinstance(model, vit.VisionTransformer):
            return (
                f"{type(model).__name__} is another architecture (rotary, windowed) or a wrapper, "
                "whose image model is to be passed instead"
            )
        if model.num_reg_tokens:
            return f"it has {model.num_reg_tokens} register tokens, and only CLS may be a prefix"
        if not model.has_class_token:
            return "it has no CLS token to score with"
        if model.num_prefix_tokens != 1:
            return "it has a distillation token, and only CLS may be a prefix"
        if model.global_pool not in ("token", ""):
            return f"it pools by {model.global_pool!r}, which dropped tokens would change"
        if getattr(model.patch_drop, "prob", 0.0) > 0:
            return "it has patch dropout of its own (patch_drop_rate), so patches have no position"
        if model.dynamic_img_size:
            return "its number of patches changes from call to call (dynamic_img_size)"
        reasons = (_refuses_block(block) for block in model.blocks)
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def checkpointing(self) -> bool:
        return self.model.grad_checkpointing

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def attend(self, i: int, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        block = self.blocks[i]
        attended = block.attn(block.norm1(tokens), attn_mask=bias)
        return tokens + block.drop_path1(block.ls1(attended))

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        block = self.blocks[i]
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def attention_map(self, i: int, tokens: Tensor) -> Tensor:
        block = self.blocks[i]
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return torch.matmul(q * block.attn.scale, k.mT).softmax(-1)

    def cls_attention(self, i: int, tokens: Tensor, cls: Tensor) -> Tensor:
        return cls_attention_from_tokens(tokens, cls, **_query_and_key(self.blocks[i]))

    def score_reduce(
        self, i: int, tokens: Tensor, cls: Tensor, keep: int, *, merge: bool
    ) -> tuple[Tensor, ReductionInfo, Tensor]:
        block = _query_and_key(self.blocks[i])
        return score_reduce(tokens, cls, keep, merge=merge, return_info=True, **block)

    def cls_block(self, i: int, tokens: Tensor, cls: Tensor) -> Tensor:
        block = self.blocks[i]
        attn, width = block.attn, _attention_width(block)
        value = {"v_weight": attn.qkv.weight[2 * width :], "v_bias": _rows(attn.qkv.bias, 2, width)}
        out = cls_attend_from_tokens(tokens, cls, **_query_and_key(block), **value)[:, None]
        out = attn.proj_drop(attn.proj(attn.norm(out)))
        cls = cls[:, None] + block.drop_path1(block.ls1(out))
        return self.mlp(i, cls)[:, 0]

    def is_plain(self, i: int) -> bool:
        block = self.blocks[i]
        return (
            type(block) is vit.Block
            and type(block.attn) is Attention
            and _refuses_block(block) is None
            and not any(_is_observed(module) for module in block.modules())
        )

    def finish(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)


def _refuses_block(block: nn.Module) -> str | None:
    if not isinstance(block, vit.Block):
        return f"its blocks are {type(block).__name__} (parallel or post-norm), not pre-norm Block"
    attn = block.attn
    if not isinstance(attn, Attention):
        return f"its attention is {type(attn).__name__}, whose CLS row has no absorbed form"
    if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
        return "it normalises queries and keys, so the key projection cannot be absorbed"
    if getattr(attn, "gate", None) is not None:
        return "it gates its attention output"
    if type(attn.qkv) is not nn.Linear or not isinstance(block.norm1, nn.LayerNorm):
        return (
            f"a block has a {type(attn.qkv).__name__} after a {type(block.norm1).__name__} where "
            "the CLS row needs nn.Linear after LayerNorm (merge adapters first)"
        )
    return None


def _is_observed(module: nn.Module) -> bool:
    """A hook or a replaced forward sees its calls, or it is in training mode."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or module.training or "forward" in vars(module)


def _attention_width(block: vit.Block) -> int:
    return block.attn.num_heads * block.attn.head_dim


def _rows(bias: Tensor | None, part: int, width: int) -> Tensor | None:
    return None if bias is None else bias[part * width : (part + 1) * width]


def _query_and_key(block: vit.Block) -> dict[str, Tensor | float | int | None]:
    """What the absorbed CLS row reads of a block, as the kernels name it."""
    attn, norm, width = block.attn, block.norm1, _attention_width(block)
    return {
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "eps": norm.eps,
        "q_weight": attn.qkv.weight[:width],
        "q_bias": _rows(attn.qkv.bias, 0, width),
        "k_weight": attn.qkv.weight[width : 2 * width],
        "num_heads": attn.num_heads,
        "scale": attn.scale,
    }
