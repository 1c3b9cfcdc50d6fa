"""What a projection really is, where somebody's wrapper stands around it: one place that says so.

    nn.Linear    W, also a parametrized one
    LoRA         W + sum_a s_a B_a A_a                       a over the adapters that are active
    DoRA         W + sum_a (g_a - 1) W + g_a s_a B_a A_a     g_a = m_a / |W + s_a B_a A_a|, by row

Merged or disabled adapters leave W as it is now. Nothing is kept from call to call: no version of a
parameter tells of a change through `.data`, or by an optimizer's own kernels. Any other layer
(quantised, hooked, with another forward) is not read: who needs what it makes calls it. Classes of
peft are known by their names, so that nothing here needs it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from elip_kernels.autocast import no_autocast
from elip_models.towers.fsdp import is_sharded

LIBRARIES = ("torch.nn.", "timm.", "open_clip.", "transformers.")
PEFT = ("peft.tuners.lora.", "peft.utils.other", "elip_models.models.peft.adapt")


class Affine(NamedTuple):
    """x -> x W^T + b."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def thirds(self) -> list["Affine"]:
        """Queries, keys and values of a projection that makes them together."""
        biases = (None,) * 3 if self.bias is None else self.bias.chunk(3)
        return [Affine(*third) for third in zip(self.weight.chunk(3), biases, strict=True)]


def is_hooked(module: nn.Module) -> bool:
    """A forward hook, or another forward on the module itself, sees or changes its calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that peft's wrapper of `modules_to_save` calls; any other as it is."""
    if not _is_peft(module, "peft.utils.other", "ModulesToSaveWrapper") or is_hooked(module):
        return module
    adapters, trained = module.active_adapters, module.modules_to_save
    if module.disable_adapters or not adapters or any(a not in trained for a in adapters):
        return module.original_module
    return trained[adapters[0]]


def is_layer_norm(module: nn.Module) -> bool:
    """Its weight, bias and eps say all of what a call of the module does."""
    known = type(module).forward.__module__.startswith(LIBRARIES)
    return isinstance(module, nn.LayerNorm) and known and not is_hooked(module)


def is_known(module: nn.Module) -> bool:
    """One of the libraries' own, which treat each token apart from the others, attention aside."""
    return type(module).__module__.startswith(LIBRARIES + PEFT)


def is_plain(block: nn.Module) -> bool:
    """Modules of the libraries' own in eval mode, which no hook and no other forward watches."""
    modules = block.modules()
    return all(is_known(m) and not is_hooked(m) and not m.training for m in modules)


def refuses_norm(norm: nn.Module) -> str | None:
    """Why a block cannot begin with it, in one sentence, or None: a wrapper is called."""
    norm = unwrapped(norm)
    if isinstance(norm, nn.LayerNorm) or not is_known(norm):
        return None
    return f"a block begins with a {type(norm).__name__} where the CLS row needs LayerNorm"


def affine(layer: nn.Module) -> Affine | None:
    """The map of a layer, or None where only a call of it tells. LoRA's has no gradient.

    Raises:
        TypeError: a layer that is sharded by itself.
    """
    layer = unwrapped(layer)
    if is_sharded(layer):
        raise TypeError(
            f"model: expected blocks that are sharded whole, got a {type(layer).__name__} that is "
            "sharded by itself, which a block before it cannot read; fully_shard its block"
        )
    if _is_peft(layer, "peft.tuners.lora.layer", "Linear"):
        return None if is_hooked(layer) else _lora(layer)
    return _linear(layer)


def through_transpose(x: Tensor, layer: nn.Module) -> Tensor:
    """X (B, out) W -> (B, in) of a layer without bias; where only a call tells, of what it makes of
    each input feature alone.
    """
    known = affine(layer)
    if known is not None:
        return x @ known.weight
    return x @ layer(torch.eye(layer.in_features, dtype=x.dtype, device=x.device)).T


def qkv_of(*layers: nn.Module) -> list[Affine] | None:
    """Queries, keys and values of one layer that makes all three, or of three; None as `affine`."""
    maps = [affine(layer) for layer in layers]
    if any(each is None for each in maps):
        return None
    return maps[0].thirds() if len(maps) == 1 else maps


def is_lora_attention(module: nn.Module) -> bool:
    """Peft's LoRA around a whole nn.MultiheadAttention."""
    return _is_peft(module, "peft.tuners.lora.layer", "MultiheadAttention")


def in_projection(attn: nn.Module) -> Affine:
    """q, k and v of an attention that has them as parameters, by LoRA's gradient where it has it.

    peft adds its delta to them in the attention's own forward, and takes it out again.
    """
    if not is_lora_attention(attn):
        return Affine(attn.in_proj_weight, attn.in_proj_bias)
    base = attn.get_base_layer()
    if attn.disable_adapters and attn.merged:
        attn.unmerge()  # as its own forward does
    weight = base.in_proj_weight
    if not attn.disable_adapters and not attn.merged:
        for adapter in _active(attn):
            weight = weight + attn.get_delta_weight(adapter).to(weight.dtype)
    return Affine(weight, base.in_proj_bias)


def out_projection(attn: nn.Module, attended: Tensor) -> Tensor:
    """(B, N, D) through the output projection of an attention as `in_projection` takes it.

    Of LoRA's, peft itself merges the weight for a moment, as in the attention's own forward: how
    often it adds its delta there is not ours to know.
    """
    if not is_lora_attention(attn):
        return attn.out_proj(attended)
    merges = not attn.disable_adapters and not attn.merged
    if merges:
        attn.merge(adapter_names=_active(attn))
    try:
        linear = attn.get_base_layer().out_proj.get_base_layer()
        return F.linear(attended, linear.weight, linear.bias)
    finally:
        if merges:
            attn.unmerge()


def _is_peft(module: nn.Module, file: str, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__ == file


def _active(layer: nn.Module) -> list[str]:
    """The active ones of the adapters that the layer has."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _linear(layer: nn.Module) -> Affine | None:
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return None
    weight = layer.weight
    is_quantised = is_traceable_wrapper_subclass(weight)
    return None if is_quantised or is_hooked(layer) else Affine(weight, layer.bias)


def _lora(layer: nn.Module) -> Affine | None:
    base = _linear(layer.base_layer)
    if base is None or (layer.disable_adapters and layer.merged):  # its next call unmerges it
        return None
    adapters = [] if layer.disable_adapters or layer.merged else _active(layer)
    if not adapters:
        return base
    if not all(_is_affine(layer, adapter) for adapter in adapters):
        return None
    return _adapted(layer, base, adapters)


def _is_affine(layer: nn.Module, adapter: str) -> bool:
    """The adapter is one of the formulas at the top, made of layers that are as they seem."""
    if any(_linear(part[adapter]) is None for part in (layer.lora_A, layer.lora_B)):
        return False
    variant = layer.lora_variant.get(adapter)
    if adapter not in layer.lora_magnitude_vector:
        return variant is None
    return type(variant).__name__ == "DoraLinearVariant" and not layer.lora_bias[adapter]


@torch.no_grad()
def _adapted(layer: nn.Module, base: Affine, adapters: list[str]) -> Affine:
    weight, bias = base
    with no_autocast(weight):
        for adapter in adapters:
            delta = layer.get_delta_weight(adapter)
            if adapter in layer.lora_magnitude_vector:
                updated = base.weight + delta
                magnitude = layer.lora_magnitude_vector[adapter].weight
                gain = magnitude / torch.linalg.norm(updated, dim=1)
                delta = gain[:, None] * updated - base.weight
            weight = weight + delta
            if layer.lora_bias[adapter]:
                more = layer.lora_B[adapter].bias * layer.scaling[adapter]
                bias = more if bias is None else bias + more
    return Affine(weight.to(base.weight.dtype), bias)
