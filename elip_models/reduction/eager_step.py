"""Eager calls from a compiled block, in a separate file because it imports torch._dynamo."""

from collections.abc import Callable
from typing import Any

import torch

from elip_models.reduction.step import BlockStep


@torch.compiler.disable
def enter_eagerly(enter: Callable[..., BlockStep], args: Any, kwargs: Any) -> BlockStep:
    """Return `enter(args, kwargs)` without `info`, which a graph cannot read.

    It runs outside of the graph of a block that is compiled by itself: in the graph, a recomputed
    block would score again, without the guidance.
    """
    return enter(args, kwargs)._replace(info=None)
