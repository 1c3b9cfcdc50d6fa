"""A batch encoded in slices, each recomputed in backward: gradient caching.

    f   = [E(x_1), .., E(x_S)],  nothing kept of an E(x_s) but its inputs and what it gives
    L   = loss(f), over the whole batch;  in backward E(x_s) runs again, one slice at a time

The gradients are those of the whole batch at once, for the memory of one slice: a loss that
compares all pairs needs features of all, and activations of none. Source: Gao et al., Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup, 2021; here by activation checkpointing,
which draws again what dropout drew.
"""

from collections.abc import Callable
from itertools import repeat

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_slices(encode: Callable[..., Tensor], count: int, *inputs: Tensor | None) -> Tensor:
    """Encode a batch in slices.

    Args:
        encode: of inputs with the rows of a slice, (b, ..) each or None -> (b, E).
        count: of slices; more than the batch has rows are one a row. 1 encodes it whole.
        inputs: (B, ..) each, or None.

    Returns:
        (B, E). Where no gradient is asked for, the batch is encoded whole.
    """
    if count == 1 or not torch.is_grad_enabled():
        return encode(*inputs)
    parts = [repeat(None) if each is None else each.chunk(count) for each in inputs]
    slices = zip(*parts, strict=False)  # a None has no end
    return torch.cat([checkpoint(encode, *each, use_reentrant=False) for each in slices])
