"""Gradient caching: encode a batch in slices, and recompute each slice in backward.

    f   = [E(x_1), .., E(x_S)], which stores only the inputs and outputs of each E(x_s)
    L   = loss(f) over the whole batch; backward runs E(x_s) again, one slice at a time

The gradients equal those of the whole batch, with the activation memory of one slice. A contrastive
loss needs the features of all pairs, but not their activations.
Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021;
here by activation checkpointing, which repeats the same dropout.
"""

from collections.abc import Callable
from itertools import repeat

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def encode_in_slices(encode: Callable[..., Tensor], count: int, *inputs: Tensor | None) -> Tensor:
    """Encode a batch in `count` slices, at most one per row; without gradient, encode it whole.

    `encode` maps inputs with the rows of a slice, (b, ..) each or None, to (b, E).
    """
    if count == 1 or not torch.is_grad_enabled():
        return encode(*inputs)
    parts = [repeat(None) if each is None else each.chunk(count) for each in inputs]
    slices = zip(*parts, strict=False)  # repeat(None) is infinite
    return torch.cat([checkpoint(encode, *each, use_reentrant=False) for each in slices])
