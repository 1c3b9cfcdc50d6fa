"""Eager calls from a compiled block, in a separate file because it imports torch._dynamo."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")


@torch.compiler.disable
def run_eagerly(step: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """Run `step(args, kwargs)` of a block that is compiled by itself outside of its graph.

    In the graph, a recomputed block would score again, without the guidance.
    """
    return step(args, kwargs)
