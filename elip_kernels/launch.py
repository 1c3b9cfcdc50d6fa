"""Block sizes and warps: the only hardware numbers.

Static figures are those of sm_90 in the compile report, without a spill.

A row of a slice of D is one cache line, 128 bytes: BLOCK_D 64 for two-byte types, 32 for fp32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TOKENS = 1025  # one program holds an image's candidates: 1,024 and one prefix token


class Launch(NamedTuple):
    """Tile of one program (tokens x features) and its warps."""

    block_n: int
    block_d: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def reduce_forward(candidates: int, element_size: int) -> Launch:
    """256 candidates: 8 warps hold the tile in 32 registers a thread; beyond 512, half a line."""
    block_n = max(16, next_power_of_2(candidates))
    line = 128 if block_n <= 512 else 64
    return Launch(block_n, line // element_size, 4 if block_n <= 128 else 8)


def reduce_backward(element_size: int) -> Launch:
    """32 x 128 (two-byte types): 16 elements a thread, no shared memory, full occupancy."""
    return Launch(32, 256 // element_size, 8)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launches inside go to the tensor's own device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
