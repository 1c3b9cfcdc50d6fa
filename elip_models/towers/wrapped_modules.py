"""Modules that peft or FSDP2 have wrapped: the weights that they apply, and their parameters.

Weights of a projection:

    nn.Linear    W, also a parametrized one
    LoRA         W + sum_a s_a B_a A_a     a over the active adapters

Merged or disabled adapters leave W as it is now. Nothing is cached between calls, because no
version counter records a change through `.data` or by an optimizer's own kernels. Any other layer
(DoRA, quantised, hooked, with another forward) has no readable weight: callers run it instead.

`fully_shard` (FSDP2) gathers a module's parameters in a forward pre-hook, before all other hooks,
and frees them in a forward hook. Elsewhere, `unsharded(module)` gathers them without gradient, and
`in_place_of(module, f, x)` runs f between FSDP's hooks, with gradient. FSDP1 is not supported. A
block that is read for a score is gathered once more, unless it is the current one.

Classes of peft and FSDP are found by name: peft is optional, and importing FSDP is slow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from elip_kernels.autocast import no_autocast
from elip_models.towers.tower_parts import is_hooked, is_peft, unwrapped

R = TypeVar("R")

LIBRARIES = ("torch.nn.", "timm.", "open_clip.", "transformers.")
PEFT = ("peft.tuners.lora.", "peft.utils.other", "elip_models.integrations.peft.adapt")
FSDP1 = (
    "it is wrapped by FullyShardedDataParallel, which flattens the parameters that the reduction "
    "reads by name; shard it by torch.distributed.fsdp.fully_shard instead"
)


class Affine(NamedTuple):
    """The map x -> x W^T + b."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map to the last dimension of x."""
        return F.linear(x, self.weight, self.bias)

    def thirds(self) -> list["Affine"]:
        """Split a joint projection into those of queries, keys and values."""
        biases = (None,) * 3 if self.bias is None else self.bias.chunk(3)
        return [Affine(*third) for third in zip(self.weight.chunk(3), biases, strict=True)]


def is_layer_norm(module: nn.Module) -> bool:
    """Return whether weight, bias and eps determine what the module computes."""
    is_library = type(module).forward.__module__.startswith(LIBRARIES)
    return isinstance(module, nn.LayerNorm) and is_library and not is_hooked(module)


def is_known(module: nn.Module) -> bool:
    """Return whether the module's class treats each token alone, attention aside."""
    return type(module).__module__.startswith(LIBRARIES + PEFT)


def is_plain(block: nn.Module) -> bool:
    """Return whether all modules are of known classes, in eval mode and without hooks."""
    modules = block.modules()
    return all(is_known(m) and not is_hooked(m) and not m.training for m in modules)


def refuses_norm(norm: nn.Module) -> str | None:
    """Return why a block cannot begin with this norm, in one sentence, or None if it can."""
    norm = unwrapped(norm)
    if isinstance(norm, nn.LayerNorm) or not is_known(norm):
        return None
    return f"a block begins with a {type(norm).__name__} where the CLS row needs LayerNorm"


def affine(layer: nn.Module) -> Affine | None:
    """Return the map of a layer, or None if it has no readable weight. LoRA's has no gradient.

    Raises:
        TypeError: a layer that is sharded without the rest of its block.
    """
    layer = unwrapped(layer)
    if is_sharded(layer):
        raise TypeError(
            f"model: expected blocks that are sharded whole, got a {type(layer).__name__} that is "
            "sharded by itself, which a block before it cannot read; fully_shard its block"
        )
    if is_peft(layer, "peft.tuners.lora.layer", "Linear"):
        return None if is_hooked(layer) else _lora(layer)
    return _linear(layer)


def through_transpose(x: Tensor, layer: nn.Module) -> Tensor:
    """Return x W, (B, out) -> (B, in), for a layer without bias.

    Without a readable weight, W comes from a call on each input feature.
    """
    known = affine(layer)
    if known is not None:
        return x @ known.weight
    return x @ layer(torch.eye(layer.in_features, dtype=x.dtype, device=x.device)).T


def qkv_of(*layers: nn.Module) -> list[Affine] | None:
    """Return the projections of queries, keys and values, from one joint layer or three layers.

    None if a layer has no readable weight.
    """
    maps = [affine(layer) for layer in layers]
    if any(projection is None for projection in maps):
        return None
    return maps[0].thirds() if len(maps) == 1 else maps


def is_lora_attention(module: nn.Module) -> bool:
    """Return whether the module is peft's LoRA around a whole nn.MultiheadAttention."""
    return is_peft(module, "peft.tuners.lora.layer", "MultiheadAttention")


def is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to the module itself."""
    return _is_fsdp(module, "FSDPModule")


def refuses_sharding(model: nn.Module) -> str | None:
    """Return why the model's sharding hides its parameters, in one sentence, or None."""
    return FSDP1 if any(_is_flattened(module) for module in model.modules()) else None


def library_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without the one that `fully_shard` puts in front."""
    return type(module).__mro__[2] if is_sharded(module) else type(module)


@contextmanager
def unsharded(module: nn.Module, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Gather the module's own parameters inside; free them at the end if they were sharded before.

    Yields `tensors` in the dtype of the gathered parameters, as the module's forward gets them
    under mixed precision.
    """
    if _is_flattened(module):
        raise TypeError(f"model: expected one whose blocks can be read, but {FSDP1}")
    if not is_sharded(module):
        yield tensors
        return
    before = list(module.parameters())
    module.unshard()
    was_sharded = any(a is not b for a, b in zip(before, module.parameters(), strict=True))
    dtype = next(module.parameters()).dtype
    try:
        yield tuple(t.to(dtype) if t.itemsize > dtype.itemsize else t for t in tensors)
    finally:
        if was_sharded:
            module.reshard()


def in_place_of(
    module: nn.Module, function: Callable[[Tensor], tuple[Tensor, R]], tokens: Tensor
) -> tuple[Tensor, R]:
    """Run `function(tokens) -> (tokens, more)` in place of the module's forward, with gradient."""
    if not is_sharded(module):
        if _has_sharded_parameters(module):
            raise ValueError(
                f"model: expected gathered parameters, got a {type(module).__name__} that is "
                "sharded as part of another module; fully_shard it too, or call the whole model"
            )
        return function(tokens)
    from torch.distributed.fsdp import register_fsdp_forward_method

    results = []  # FSDP's hooks take tensors alone

    def run(tokens: Tensor) -> Tensor:
        tokens, more = function(tokens)
        results.append(more)
        return tokens

    module._in_place_of_forward = run
    register_fsdp_forward_method(module, "_in_place_of_forward")
    try:
        return module._in_place_of_forward(tokens), results[0]
    finally:
        del module._in_place_of_forward


def _has_sharded_parameters(module: nn.Module) -> bool:
    if not (dist.is_available() and dist.is_initialized()):  # no DTensor without a process group
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(next(module.parameters()), DTensor)


def _is_flattened(module: nn.Module) -> bool:
    """Return whether FSDP1 was applied to the module itself."""
    return _is_fsdp(module, "FullyShardedDataParallel")


def _is_fsdp(module: nn.Module, name: str) -> bool:
    mro = type(module).__mro__
    return any(c.__name__ == name and c.__module__.startswith("torch.distributed.") for c in mro)


def active_adapters(layer: nn.Module) -> list[str]:
    """Return the active adapters that the layer has."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _linear(layer: nn.Module) -> Affine | None:
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return None
    weight = layer.weight
    is_quantised = hasattr(weight, "__tensor_flatten__")  # the protocol of wrapper subclasses
    return None if is_quantised or is_hooked(layer) else Affine(weight, layer.bias)


def _lora(layer: nn.Module) -> Affine | None:
    base = _linear(layer.base_layer)
    if base is None or (layer.disable_adapters and layer.merged):  # its next call unmerges it
        return None
    adapters = [] if layer.disable_adapters or layer.merged else active_adapters(layer)
    if not adapters:
        return base
    if not all(_is_plain_lora(layer, adapter) for adapter in adapters):
        return None
    return _adapted(layer, base, adapters)


def _is_plain_lora(layer: nn.Module, adapter: str) -> bool:
    """Return whether the adapter is plain LoRA, as in the formula at the top."""
    is_readable = all(_linear(part[adapter]) for part in (layer.lora_A, layer.lora_B))
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
