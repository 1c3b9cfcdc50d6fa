"""Block sizes and warps: the only hardware numbers.

Static figures are those of sm_90 in the compile report, without a spill.

A row of a slice of D is one cache line, 128 bytes: BLOCK_D 64 for two-byte types, 32 for fp32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elip_kernels._triton import HAS_TRITON, triton

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
    """256 candidates: 8 warps, 64 registers, 32 of them for the tile; beyond 512, half a line."""
    block_n = max(16, next_power_of_2(candidates))
    line = 128 if block_n <= 512 else 64
    return Launch(block_n, line // element_size, 4 if block_n <= 128 else 8)


def reduce_backward(element_size: int) -> Launch:
    """32 x 128 (two-byte types): 16 elements a thread, no shared memory, full occupancy."""
    return Launch(32, 256 // element_size, 8)


def score(candidates: int, heads: int, tokens: Tensor) -> dict[str, Any]:
    """The absorbed row: all candidates of an image in one program, D in steps of BLOCK_K.

    256 candidates in bf16: 91 registers with 8 warps and four stages of loads; 512: 105 with 16
    warps; 1,024: 106 with steps of 16. fp32 at 256: 120 with steps of 16. ROCm takes three stages,
    since four do not compile. The interpreter's products are wrong in bf16, so there all is fp32.
    """
    block_n, hip = max(16, next_power_of_2(candidates)), torch.version.hip is not None
    interpreted, wide = triton.knobs.runtime.interpret, tokens.dtype == torch.float32
    return {
        "WIDEN": interpreted,
        "PRECISION": "tf32x3" if wide and not hip and not interpreted else "ieee",
        "BLOCK_N": block_n,
        "BLOCK_H": max(16, next_power_of_2(heads)),
        "BLOCK_K": 16 if wide or block_n > 512 else 32,
        "num_warps": 4 if block_n <= 128 else 8 if block_n <= 256 else 16,
        "num_stages": 3 if wide or hip or block_n > 256 else 4,
    }


def runs_score(tokens: Tensor, heads: int) -> bool:
    """The absorbed row fits registers: up to 256 candidates in fp32, 1,024 in two-byte types."""
    most = 257 if tokens.dtype == torch.float32 else MAX_TOKENS
    return tokens.shape[1] <= most and heads <= 32


def cls_attention(num_tokens: int) -> Launch:
    """The generic row: a head's keys in steps of 32 features."""
    block_n = max(16, next_power_of_2(num_tokens))
    return Launch(block_n, 32, 4 if block_n <= 256 else 8)


def bipartite_match(channels: int, element_size: int) -> tuple[int, int, int, int]:
    """BLOCK_A, BLOCK_B, BLOCK_C, warps: four programs an image at N = 257. 96 registers with
    64 two-byte channels, where 64 x 64 tokens take 174; 84 with 16 of fp32, which has no tensor
    cores in full precision."""
    block_c = min(64 if element_size == 2 else 16, next_power_of_2(channels))
    return 32, 32, max(16, block_c), 4


def bipartite_merge(num_a: int, element_size: int) -> tuple[int, int, int, int]:
    """BLOCK_A, BLOCK_R, BLOCK_D, warps: 16 rows of 512 bytes, so that reading N slots is little
    beside them; both tiles, rows x A and rows x D, stay in registers (8 warps, at most 106)."""
    return max(16, next_power_of_2(num_a)), 16, 512 // element_size, 8


def runs_kernel(*tensors: Tensor, num_tokens: int) -> bool:
    """Triton takes it: there is one, no fp64, and an image's candidates fit one program."""
    has_fp64 = any(t.dtype == torch.float64 for t in tensors)
    return HAS_TRITON and not has_fp64 and num_tokens <= MAX_TOKENS


def addressable(tokens: Tensor) -> Tensor:
    """`tokens` (B, N, D), copied where 32-bit offsets within an image would not reach."""
    fits = tokens.stride(2) == 1 and tokens.stride(1) * tokens.shape[1] < 2**31
    return tokens if fits else tokens.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launches inside go to the tensor's own device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
