"""Eager calls from a compiled block, in a separate file because it imports torch._dynamo."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@torch.compiler.disable
def call_eagerly(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function outside of the graph of a block that is compiled by itself.

    In the graph, a recomputed block would score again, without the guidance.
    """
    return function(*args, **kwargs)
