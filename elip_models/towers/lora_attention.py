"""The projections of an attention that has them as parameters, with the updates of LoRA."""

import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.towers.wrapped_modules import Affine, active_adapters, is_lora_attention


def in_projection(attn: nn.Module) -> Affine:
    """Return the joint q, k and v projection of an attention that has it as parameters.

    LoRA's update is included, with its gradient.
    """
    if not is_lora_attention(attn):
        return Affine(attn.in_proj_weight, attn.in_proj_bias)
    base = attn.get_base_layer()
    if attn.disable_adapters and attn.merged:
        attn.unmerge()  # as its own forward does
    weight = base.in_proj_weight
    if not attn.disable_adapters and not attn.merged:
        for adapter in active_adapters(attn):
            weight = weight + attn.get_delta_weight(adapter).to(weight.dtype)
    return Affine(weight, base.in_proj_bias)


def out_projection(attn: nn.Module, attended: Tensor) -> Tensor:
    """Apply the output projection of an attention to `attended` (B, N, D).

    LoRA's weight is merged by peft itself, as in the attention's own forward: the number of times
    that peft adds its update there depends on its version.
    """
    if not is_lora_attention(attn):
        return attn.out_proj(attended)
    merges = not attn.disable_adapters and not attn.merged
    if merges:
        attn.merge(adapter_names=active_adapters(attn))
    try:
        linear = attn.get_base_layer().out_proj.get_base_layer()
        return F.linear(attended, linear.weight, linear.bias)
    finally:
        if merges:
            attn.unmerge()
