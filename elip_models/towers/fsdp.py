"""Modules sharded by FSDP2, whose parameters are whole only while their own forward runs.

`fully_shard` gathers a module's parameters in a forward pre-hook, which comes before all others in
either order of `fully_shard` and `reduce_`, and frees them in a forward hook. Elsewhere

    in `unsharded(module)`       they are read without gradient, and FSDP's record is left alone
    by `as_forward(module, f)`  f runs in place of the module's forward, with gradient

A block that is read for a score is gathered once more than without, unless it is the current one.
Only public methods of torch.distributed.fsdp are used. FSDP1 has none that fit, and is refused.
Classes are known by their names, since importing them takes half as long as importing torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

FSDP1 = (
    "it is wrapped by FullyShardedDataParallel, which flattens the parameters that the reduction "
    "reads by name; shard it by torch.distributed.fsdp.fully_shard instead"
)


def is_sharded(module: nn.Module) -> bool:
    """`fully_shard` was applied to the module itself."""
    return _is_a(module, "FSDPModule")


def refuses_sharding(model: nn.Module) -> str | None:
    """Why the way the model is sharded hides its parameters, in one sentence, or None."""
    return FSDP1 if any(_is_flattened(module) for module in model.modules()) else None


def library_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before `fully_shard` put its own in front."""
    return type(module).__mro__[2] if is_sharded(module) else type(module)


@contextmanager
def unsharded(module: nn.Module, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Inside, the module's own parameters are whole; they are freed again if they were not before.

    Yields `tensors`, in the dtype that mixed precision gathers the parameters in, as the module's
    forward would get them.
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


def as_forward(module: nn.Module, function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """`function(tokens)` in place of the module's forward, between FSDP's hooks."""
    if not is_sharded(module):
        from torch.distributed.tensor import DTensor

        if isinstance(next(module.parameters()), DTensor):
            raise ValueError(
                f"model: expected gathered parameters, got a {type(module).__name__} that is "
                "sharded as part of another module; fully_shard it too, or call the whole model"
            )
        return function(tokens)
    from torch.distributed.fsdp import register_fsdp_forward_method

    module._as_forward = function
    register_fsdp_forward_method(module, "_as_forward")
    try:
        return module._as_forward(tokens)
    finally:
        del module._as_forward


def _is_flattened(module: nn.Module) -> bool:
    """FSDP1 was applied to the module itself."""
    return _is_a(module, "FullyShardedDataParallel")


def _is_a(module: nn.Module, name: str) -> bool:
    """FSDP's class of that name is among the module's."""
    mro = type(module).__mro__
    return any(c.__name__ == name and c.__module__.startswith("torch.distributed.") for c in mro)
