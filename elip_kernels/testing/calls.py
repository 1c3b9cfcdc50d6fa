"""Calls of the public ops, as models use them, for reports and checks."""

import torch
from torch import Tensor

import elip_kernels  # noqa: F401  (its examples)
from elip_kernels._example import EXAMPLES, Sizes

# (N, K) of images of 224/16, 224/14 and 336/14 when 65% of the patches stay.
REAL_CASES = ((197, 127), (257, 166), (577, 374))
BATCHES = (2, 128)  # small and large batches may use different kernels
WITH_KERNELS = [name for name, example in EXAMPLES.items() if example.has_kernels]


def call(
    name: str, B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Call an op on its example; return the tensors of its result, and last the gradient."""
    example = EXAMPLES[name]
    return example.outputs(example.arguments(Sizes(B, N, D, K, H, dtype)))
