"""Eager calls from a compiled block, in a separate file because it imports torch._dynamo.

In the graph of a block that is compiled by itself, a recomputed block would score again, without
the guidance.
"""

import torch
from torch import Tensor

from elip_models.reduction.forward_passes import EnteredBlock
from elip_models.reduction.reduced_model import Args, Kwargs, ReducedBlock


@torch.compiler.disable
def enter_eagerly(block: ReducedBlock, args: Args, kwargs: Kwargs) -> EnteredBlock:
    """Enter the block outside of its graph; return the result without what a graph cannot read."""
    try:
        entered = block.enter(args, kwargs)
    except BaseException:
        block.reduction.eager.abandon()
        raise
    return entered._replace(step=entered.step._replace(info=None))


@torch.compiler.disable
def leave_eagerly(block: ReducedBlock, entered: EnteredBlock, tokens: Tensor) -> Tensor:
    """Leave the block outside of its graph."""
    return block.reduction.eager.leave_block(block.i, entered, tokens)
