"""What runs in place of a module's forward, and what a forward is that somebody stands in for."""

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor, nn

from elip_models.towers.fsdp import as_forward

if TYPE_CHECKING:
    from elip_models.towers.base import Tower

P = ParamSpec("P")
R = TypeVar("R")


def own_forward(block: nn.Module) -> Callable[..., Any]:
    """What the block runs without a stand-in of ours: its class's forward, or another's in place
    of that.
    """
    forward = vars(block).get("forward")
    if forward is None:
        return partial(type(block).forward, block)
    return getattr(forward, "own_forward", forward)


def in_forward(
    run: Callable[Concatenate["Tower", Tensor, P], tuple[Tensor, R]],
) -> Callable[Concatenate["Tower", Tensor, P], tuple[Tensor, R]]:
    """`run(tower, images, ..) -> (tokens, more)` in place of the forward of the tower's model."""

    @wraps(run)
    def run_in_forward(
        tower: "Tower", images: Tensor, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Tensor, R]:
        return in_place_of(tower.model, lambda x: run(tower, x, *args, **kwargs), images)

    return run_in_forward


def in_place_of(
    module: nn.Module, step: Callable[[Tensor], tuple[Tensor, R]], tokens: Tensor
) -> tuple[Tensor, R]:
    """`step(tokens) -> (tokens, more)` in place of the module's forward, with gradient."""
    more = []

    def forward(tokens: Tensor) -> Tensor:
        tokens, rest = step(tokens)
        more.append(rest)
        return tokens

    return as_forward(module, forward, tokens), more[0]
