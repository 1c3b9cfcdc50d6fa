"""The maps of projections with the updates of peft's LoRA.

    W + sum_a s_a B_a A_a     a over the active adapters

Merged or disabled adapters leave W as it is now. LoRA wraps a linear layer, or a whole attention
that has its projections as parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_kernels.autocast import no_autocast
from elip_models.towers.tower_data import Affine
from elip_models.towers.tower_parts import is_hooked, is_peft, linear_map


def is_lora_attention(module: nn.Module) -> bool:
    """Return whether the module is peft's LoRA around a whole nn.MultiheadAttention."""
    return is_peft(module, "peft.tuners.lora.layer", "MultiheadAttention")


def active_adapters(layer: nn.Module) -> list[str]:
    """Return the active adapters that the layer has."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def lora_map(layer: nn.Module) -> Affine | None:
    """Return the map of LoRA's linear layer, without gradient; None if no weight is readable."""
    base = linear_map(layer.base_layer)
    unmerges = layer.disable_adapters and layer.merged  # in its next call
    if base is None or is_hooked(layer) or unmerges:
        return None
    adapters = [] if layer.disable_adapters or layer.merged else active_adapters(layer)
    if not adapters:
        return base
    if not all(_is_plain_lora(layer, adapter) for adapter in adapters):
        return None
    return _adapted(layer, base, adapters)


def _is_plain_lora(layer: nn.Module, adapter: str) -> bool:
    """Return whether the adapter is plain LoRA, as in the formula at the top."""
    is_readable = all(linear_map(part[adapter]) for part in (layer.lora_A, layer.lora_B))
    return is_readable and layer.lora_variant.get(adapter) is None


@torch.no_grad()
def _adapted(layer: nn.Module, base: Affine, adapters: list[str]) -> Affine:
    weight, bias = base
    with no_autocast(weight):
        for adapter in adapters:
            weight = weight + layer.get_delta_weight(adapter)
            if layer.lora_bias[adapter]:
                more = layer.lora_B[adapter].bias * layer.scaling[adapter]
                bias = more if bias is None else bias + more
    return Affine(weight.to(base.weight.dtype), bias)


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
