"""A batch encoded in slices, each recomputed in backward: gradient caching.

    f   = [E(x_1), .., E(x_S)],  nothing kept of an E(x_s) but its inputs and what it gives
    L   = loss(f), over the whole batch;  in backward E(x_s) runs again, one slice at a time

The gradients are those of the whole batch at once, for the memory of one slice: a loss that
compares all pairs needs features of all, and activations of none. Source: Gao et al., Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup, 2021; here by activation checkpointing,
which draws again what dropout drew.
"""

from collections.abc import Callable

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
    batch = next(len(each) for each in inputs if each is not None)
    sizes = [len(part) for part in torch.empty(batch).chunk(count)]
    parts = [[None] * len(sizes) if each is None else each.split(sizes) for each in inputs]
    features = [checkpoint(encode, *part, use_reentrant=False) for part in zip(*parts, strict=True)]
    return torch.cat(features)
