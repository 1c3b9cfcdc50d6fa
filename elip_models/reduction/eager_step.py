"""A step outside the graph; a file of its own, since what it needs takes a second to import."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")


@torch.compiler.disable
def outside_graph(step: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """`step(args, kwargs)` of a block compiled by itself, run eagerly, so that it can replay.

    In the graph it would score again when the block is recomputed, without the guidance.
    """
    return step(args, kwargs)
