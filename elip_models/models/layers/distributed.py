"""Features and counts of all ranks."""

from typing import Literal

import torch.distributed as dist
from torch import Tensor

Gather = Literal["local", "global"]
"""Over the pairs of this rank, or of all ranks."""


def ranks_of(gather: Gather) -> int:
    """Count the ranks that `gather` goes over."""
    is_global = gather == "global" and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if is_global else 1


def rank_of(gather: Gather) -> int:
    """Number this rank among those that `gather` goes over."""
    return dist.get_rank() if ranks_of(gather) > 1 else 0


def all_gather(values: Tensor, gather: Gather) -> Tensor:
    """Gather (B, ..) of all ranks in order -> (ranks * B, ..); the gradient returns to each
    rank.
    """
    if ranks_of(gather) == 1:
        return values
    from torch.distributed import _functional_collectives as collectives

    now, before = "all_gather_single_autograd", "all_gather_tensor_autograd"  # torch renamed it
    gather_values = getattr(collectives, now, None) or getattr(collectives, before)
    return gather_values(values.contiguous(), 0, dist.group.WORLD)


def labelled_count(labelled: Tensor, gather: Gather) -> Tensor:
    """Count the positions that a loss is the mean over: True in `labelled`, or their mean over
    ranks.

    At least as many as keep an empty sum at 0.
    """
    count, ranks = labelled.sum().float(), ranks_of(gather)
    if ranks > 1:
        dist.all_reduce(count)
        count = count / ranks
    return count.clamp_min(1 / ranks)
