"""Read the weights of modules, which peft or FSDP2 may have wrapped.

A layer's weight is that of its nn.Linear, also a parametrized one, or of LoRA's (`lora.py`).
Nothing is cached between calls, because no version counter records a change through `.data` or by
an optimizer's own kernels. Any other layer (DoRA, quantised, hooked, with another forward) has no
readable weight: callers run it instead.

`fully_shard` (FSDP2) gathers a module's parameters in a forward pre-hook, before all other hooks,
and frees them in a forward hook. Elsewhere, `unsharded(module)` gathers them without gradient, and
`in_place.py` runs functions with gradient. FSDP1 is not supported. A block that is read for a score
is gathered once more, unless it is the current one.

Classes of peft and FSDP are found by name: peft is optional, and importing FSDP is slow.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from elip_models.towers.lora import lora_map
from elip_models.towers.tower_data import Affine
from elip_models.towers.tower_parts import is_hooked, is_peft, linear_map, unwrapped

LIBRARIES = ("torch.nn.", "timm.", "open_clip.", "transformers.")
PEFT = ("peft.tuners.lora.", "peft.utils.other", "elip_models.integrations.peft.adapt")
FSDP1 = (
    "it is wrapped by FullyShardedDataParallel, which flattens the parameters that the reduction "
    "reads by name; shard it by torch.distributed.fsdp.fully_shard instead"
)


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
    is_lora = is_peft(layer, "peft.tuners.lora.layer", "Linear")
    return lora_map(layer) if is_lora else linear_map(layer)


def qkv_of(*layers: nn.Module) -> list[Affine] | None:
    """Return the projections of queries, keys and values, from one joint layer or three layers.

    None if a layer has no readable weight.
    """
    maps = [affine(layer) for layer in layers]
    if any(projection is None for projection in maps):
        return None
    return thirds(maps[0]) if len(maps) == 1 else maps


def thirds(joint: Affine) -> list[Affine]:
    """Split a joint projection into those of queries, keys and values."""
    biases = (None,) * 3 if joint.bias is None else joint.bias.chunk(3)
    return [Affine(*third) for third in zip(joint.weight.chunk(3), biases, strict=True)]


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


def _is_flattened(module: nn.Module) -> bool:
    """Return whether FSDP1 was applied to the module itself."""
    return _is_fsdp(module, "FullyShardedDataParallel")


def _is_fsdp(module: nn.Module, name: str) -> bool:
    mro = type(module).__mro__
    return any(c.__name__ == name and c.__module__.startswith("torch.distributed.") for c in mro)
