"""Collectives of the losses: features and label counts over all ranks."""

from typing import Literal

import torch.distributed as dist
from torch import Tensor

Gather = Literal["local", "global"]
"""Pairs that a loss covers: those of this rank, or of all ranks."""


def ranks_of(gather: Gather) -> int:
    """Return the number of ranks that `gather` covers."""
    is_global = gather == "global" and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if is_global else 1


def rank_of(gather: Gather) -> int:
    """Return the index of this rank among those that `gather` covers."""
    return dist.get_rank() if ranks_of(gather) > 1 else 0


def all_gather(values: Tensor, gather: Gather) -> Tensor:
    """Concatenate (B, ..) of all ranks -> (ranks * B, ..), with gradient to each rank."""
    if ranks_of(gather) == 1:
        return values
    from torch.distributed import _functional_collectives as collectives

    now, before = "all_gather_single_autograd", "all_gather_tensor_autograd"  # renamed in torch
    gather_values = getattr(collectives, now, None) or getattr(collectives, before)
    return gather_values(values.contiguous(), 0, dist.group.WORLD)


def labelled_count(labelled: Tensor, gather: Gather) -> Tensor:
    """Return the number of True positions, or its mean over ranks, but at least 1 / ranks."""
    count, ranks = labelled.sum().float(), ranks_of(gather)
    if ranks > 1:
        dist.all_reduce(count)
        count = count / ranks
    return count.clamp_min(1 / ranks)
