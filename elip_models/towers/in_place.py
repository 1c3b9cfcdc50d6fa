"""Run a function in place of a module's forward, between the hooks of FSDP2, with gradient."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from elip_models.towers.tower_parts import TowerParts
from elip_models.towers.wrapped_modules import is_sharded

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=TowerParts)


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


def in_forward(
    run: Callable[Concatenate[T, Tensor, P], tuple[Tensor, R]],
) -> Callable[Concatenate[T, Tensor, P], tuple[Tensor, R]]:
    """Make `run(tower, images, ..) -> (tokens, more)` replace the forward of the tower's model."""

    @wraps(run)
    def run_in_forward(
        tower: T, images: Tensor, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Tensor, R]:
        return in_place_of(tower.model, lambda x: run(tower, x, *args, **kwargs), images)

    return run_in_forward


def _has_sharded_parameters(module: nn.Module) -> bool:
    if not (dist.is_available() and dist.is_initialized()):  # no DTensor without a process group
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(next(module.parameters()), DTensor)
