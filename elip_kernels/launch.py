"""Block sizes and warps: the only hardware numbers.

Static figures are those of sm_90 in the compile report, without a spill there.

A row of a slice of D is one cache line, 128 bytes: BLOCK_D 64 for two-byte types, 32 for fp32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elip_kernels._triton import HAS_TRITON, is_interpreted

MAX_MOVED = 1024  # one program holds an image's candidates, and a line of each
MAX_SELECTED = 4096  # one program holds their scores alone
MAX_STREAMED = 65536  # one program reads their scores tile by tile
TILE = 2048  # of them
CODE = {"enable_fp_fusion": True}  # of every launch, whatever the default of a Triton
FEATURES = 512  # of a CLS token in one step, where an image has a program
KEYS = 64  # of a head in one program of the generic row
PART = 1024  # tokens of which one program makes weighted sums
MAX_HEADS = 128  # whose scores of a tile one program makes
MAX_CHANNELS = 128  # of a head whose query one program makes
MAX_PREFIX_TOKENS = 16  # a copy of each is in the code


class LaunchConfig(NamedTuple):
    """Tile of one program (tokens x features) and its warps."""

    block_n: int
    block_d: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def reduce_forward(candidates: int, element_size: int) -> LaunchConfig:
    """A line of every candidate: 64 registers with 8 warps at 256, 126 with 16 warps at 1,024."""
    block_n = max(16, next_power_of_2(candidates))
    return LaunchConfig(
        block_n, 128 // element_size, 4 if block_n <= 128 else 8 if block_n <= 256 else 16
    )


def reduce_backward(element_size: int) -> LaunchConfig:
    """32 x 128 (two-byte types): 16 elements a thread, no shared memory, full occupancy."""
    return LaunchConfig(32, 256 // element_size, 8)


def _precision(wide: bool) -> dict[str, Any]:
    """How products are computed: ROCm compiles no tf32x3, and the interpreter knows but one way."""
    hip, interpreted = torch.version.hip is not None, is_interpreted()
    return {"PRECISION": "tf32x3" if wide and not hip and not interpreted else "ieee"}


def _dot(heads: int, tokens: Tensor) -> dict[str, Any]:
    """What the absorbed forms share. The interpreter's products are wrong in bf16, so there all is
    fp32.
    """
    wide = tokens.dtype == torch.float32
    return _precision(wide) | {
        "HAS_REST": not wide,
        "WIDEN": is_interpreted(),
        "BLOCK_H": max(16, next_power_of_2(heads)),
    }


def query(channels: int, *tensors: Tensor | None) -> dict[str, Any]:
    """Sixteen images, the least that a product takes, of one head, 64 bytes of a row a step: 110
    registers with 8 warps in bf16, 142 in fp32. Of one dtype as many steps are under way as spill
    nowhere by Triton 3.9, and by 3.6 but for a few of fp32 with a text on sm_80; of several dtypes,
    and on ROCm, which unrolls them, two.
    """
    dtypes = {t.dtype for t in tensors if t is not None}
    block_w, element_size = max(16, next_power_of_2(channels)), max(d.itemsize for d in dtypes)
    stages = 6 if block_w > 64 else 7 if element_size == 2 else 9
    return _precision(True) | {
        "SPLIT": not (is_interpreted() and torch.bfloat16 in dtypes),
        "STAGES": stages if len(dtypes) == 1 and torch.version.hip is None else 3,
        "BLOCK_B": 16,
        "BLOCK_W": block_w,
        "BLOCK_D": 64 // element_size,
        "BLOCK_R": 256,
        "num_warps": 8,
    }


def value(channels: int, weight: Tensor) -> dict[str, Any]:
    """As `query`, which has two matrices: 67 registers with 4 warps in bf16, 63 in fp32."""
    settings = query(channels, weight) | {"num_warps": 4}
    return {name: n for name, n in settings.items() if name != "BLOCK_R"}


def score_tiles(heads: int, tokens: Tensor) -> dict[str, Any]:
    """64 patches, a line of each a step: 54 registers in bf16 on 8 warps, 69 in fp32 with three
    products; with more than 16 heads 4 warps spill on sm_86 and sm_120.
    """
    return _dot(heads, tokens) | {
        "BLOCK_N": 64,
        "BLOCK_K": 128 // tokens.element_size(),
        "num_warps": 8,
        "num_stages": 3,
    }


def select(candidates: int, tiles: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_T, warps of one image's row and selection: 40 registers at 256 candidates, 50
    at 1,024, 116 at 4,096, sixteen of them a thread.
    """
    block_n = max(16, next_power_of_2(candidates))
    return block_n, next_power_of_2(tiles), 4 if block_n <= 256 else 8


def row(candidates: int, tiles: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_T, warps of a piece of one image's row."""
    return min(256, max(16, next_power_of_2(candidates))), next_power_of_2(tiles), 4


def heads_a_step(block_n: int, block_t: int, num_warps: int) -> int:
    """Heads whose scores a piece of a row loads at once: 8 scores a thread, of four heads where
    256 candidates have 4 warps.
    """
    return max(1, min(16, 256 * num_warps // max(block_n, 2 * block_t)))


def move(candidates: int, element_size: int) -> LaunchConfig:
    """A line of at most 64 candidates a step, however many follow: 63 registers with 4 warps, where
    256 take 124 on 8.
    """
    block_n = min(64, max(16, next_power_of_2(candidates)))
    return LaunchConfig(block_n, 128 // element_size, 4)


def copy(element_size: int) -> LaunchConfig:
    """16 tokens, 512 bytes of each a step: 16 bytes a thread, twice."""
    return LaunchConfig(16, 512 // element_size, 8)


def weight_tiles(heads: int, tokens: Tensor) -> dict[str, Any]:
    """As `score_tiles`, with the warps that spill nowhere where a row is of whole lines: 80
    registers in bf16 on 4, 70 in fp32 on 8.
    """
    narrow = heads <= 16 and tokens.dtype != torch.float32
    return score_tiles(heads, tokens) | {"num_warps": 4 if narrow else 8}


def weigh(tokens: Tensor) -> dict[str, Any]:
    """A line of a tile of patches a step, for 16 heads: 72 registers in bf16, 113 in fp32."""
    return _dot(16, tokens) | {
        "BLOCK_T": 16,
        "BLOCK_D": 128 // tokens.element_size(),
        "num_warps": 4,
        "num_stages": 3,
    }


def column_sums(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """64 queries x 64 keys of two bytes: 72 registers with 64 channels, 96 with 128; 32 x 32 of
    fp32, whose three products take 213. The loop fetches its next tile, on ROCm it spills so.
    """
    wide = dtype == torch.float32
    return _precision(wide) | {
        "WIDEN": is_interpreted(),
        "BLOCK_M": 32 if wide else 64,
        "BLOCK_N": 32 if wide else 64,
        "BLOCK_D": max(16, next_power_of_2(channels)),
        "num_warps": 4,
        "num_stages": 2 if torch.version.hip is None else 1,
    }


def unsupported_head(q: Tensor) -> str | None:
    """Why `received` does not take heads so wide, or None."""
    most = MAX_CHANNELS if q.element_size() == 2 else MAX_CHANNELS // 2
    return None if q.shape[3] <= most else f"its kernels take heads of at most {most} channels"


def column_mean(queries: int, keys: int) -> dict[str, int]:
    """A piece of an image's mean; the mask of 1,024 queries a step."""
    block_n = min(256, max(16, next_power_of_2(keys)))
    return {
        "BLOCK_M": min(1024, max(16, next_power_of_2(queries))),
        "BLOCK_G": heads_a_step(block_n, 1, 4),
        "BLOCK_N": block_n,
        "num_warps": 4,
    }


def bipartite_match(channels: int, element_size: int) -> tuple[int, int, int, int]:
    """BLOCK_A, BLOCK_B, BLOCK_C, warps: four programs an image at N = 257. 96 registers with
    64 two-byte channels, where 64 x 64 tokens take 174; 84 with 16 of fp32, which has no tensor
    cores in full precision.
    """
    block_c = min(64 if element_size == 2 else 16, next_power_of_2(channels))
    return 32, 32, max(16, block_c), 4


def merge_order(tokens: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_M, warps: as many slots as there are, up to 512 at once. A thread compares 32
    pairs of a slot, and a token and a row: 112 registers.
    """
    block_m = min(512, max(64, next_power_of_2(tokens)))
    return 8192 // block_m, block_m, 8


def merge_gather(element_size: int) -> LaunchConfig:
    """16 rows of 512 bytes, 16 bytes a thread, twice: 69 registers in bf16, 62 in fp32."""
    return LaunchConfig(16, 512 // element_size, 8)


def unsupported(
    *tensors: Tensor, candidates: int = 0, num_prefix_tokens: int = 1, most: int | None = None
) -> str | None:
    """Why no kernel takes it, in a few words, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if any(t.dtype == torch.float64 for t in tensors):
        return "no kernel computes in fp64"
    if any(t[:1].numel() >= 2**31 for t in tensors):
        return "its kernels take fewer than 2^31 elements an image"
    most = MAX_STREAMED if most is None else most
    if candidates > most:
        return f"its kernels take at most {most:,} candidates an image"
    if num_prefix_tokens > MAX_PREFIX_TOKENS:
        return f"its kernels take at most {MAX_PREFIX_TOKENS} prefix tokens"
    return None


def addressable(tokens: Tensor) -> Tensor:
    """`tokens` (.., N, D), copied where 32-bit offsets within an image, or one of its heads, would
    not reach.
    """
    fits = tokens.stride(-1) == 1 and tokens.stride(-2) * tokens.shape[-2] < 2**31
    return tokens if fits else tokens.contiguous()


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Launches inside go to the tensor's own device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
