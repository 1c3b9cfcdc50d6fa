"""Block sizes, warps and limits of the kernels: the only hardware-dependent numbers.

Register counts are those of sm_90 in the compile report, where these kernels spill no registers.
Most slices of D are 64 wide for two-byte types and 32 for fp32: a row is a cache line of 128 bytes.
Functions that return a dict return the constexpr arguments and options of one launch.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elip_kernels._triton import HAS_TRITON, is_interpreted, triton

MAX_MOVED = 1024  # candidates that one program selects and moves at once
MAX_SELECTED = 4096  # candidates whose scores fit one program
MAX_STREAMED = 65536  # candidates whose scores one program reads tile by tile
TILE = 2048  # candidates per tile of these
DEVICES = frozenset({"cuda"})  # that run the kernels: CUDA and ROCm
FUSION = {"enable_fp_fusion": True}  # Triton's default will change
MAX_REGISTERS = {"maxnreg": 255}  # per thread
KEYS = 64  # keys per program of `_keys_kernel`
PART = 1024  # tokens per program of `_weigh_kernel`
MAX_HEADS = 128  # heads that one program scores
MAX_CHANNELS = 128  # channels of a head in the query kernel
MAX_KEY_CHANNELS = 16384  # channels of a head in `_keys_kernel`, 2^20 keys x channels
LEAST_CAPABILITY = (8, 0)  # of NVIDIA GPUs: bf16 and tf32 in tensor cores
MAX_PREFIX_TOKENS = 16  # the kernels unroll a loop over them


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, divisor: int) -> int:
    """Return n / divisor, rounded up; `triton.cdiv` takes longer."""
    return -(-n // divisor)


def reduce_forward(candidates: int, element_size: int) -> dict[str, int]:
    """Return a tile of all candidates: 64 registers and 8 warps at 256, 126 and 16 at 1,024."""
    block_n = max(16, next_power_of_2(candidates))
    num_warps = 4 if block_n <= 128 else 8 if block_n <= 256 else 16
    return {"BLOCK_N": block_n, "BLOCK_D": 128 // element_size, "num_warps": num_warps}


def reduce_backward(element_size: int) -> dict[str, int]:
    """Return a tile of 32 x 128 (two-byte types): 16 elements per thread, full occupancy."""
    return {"BLOCK_N": 32, "BLOCK_D": 256 // element_size, "num_warps": 8}


def _precision(wide: bool) -> dict[str, Any]:
    """Return tf32x3 for fp32 on CUDA; else ieee, which ROCm and the interpreter require."""
    hip, interpreted = torch.version.hip is not None, is_interpreted()
    return {"PRECISION": "tf32x3" if wide and not hip and not interpreted else "ieee"}


def _dot(heads: int, tokens: Tensor) -> dict[str, Any]:
    """Return the arguments that all absorbed kernels share; the interpreter multiplies in fp32."""
    wide = tokens.dtype == torch.float32
    return _precision(wide) | {
        "HAS_REST": not wide,
        "WIDEN": is_interpreted(),
        "BLOCK_H": max(16, next_power_of_2(heads)),
    }


def query(channels: int, result: torch.dtype, *tensors: Tensor | None) -> dict[str, Any]:
    """Return the configuration of the query kernel: sixteen images of one head per program.

    Sixteen is the minimum of `tl.dot`. A step has two barriers for each term of the left factor, so
    bf16 has wide steps and two terms: these hold 16 bits, as the two rows of u do. An fp32 `result`
    of two-byte matrices has three terms. The stages fit 99 KB of shared memory; with several
    dtypes, and on ROCm, which unrolls the stages, there are three. 178 registers in bf16, 158 in
    fp32. Without MAX_REGISTERS, which graphs of `torch.compile` do not take, the code for sm_120
    spills to make room for a second block.
    """
    dtypes = {t.dtype for t in tensors if t is not None}
    block_w, is_wide = max(16, next_power_of_2(channels)), torch.float32 in dtypes
    terms, hip = 3 if result == torch.float32 else 2, torch.version.hip is not None
    stages = 5 if not is_wide else 9 if block_w <= 64 else 6
    return (
        _precision(True)
        | ({} if hip else MAX_REGISTERS)
        | {
            "TERMS": 0 if is_interpreted() and torch.bfloat16 in dtypes else terms,
            "STAGES": stages if len(dtypes) == 1 and not hip else 3,
            "BLOCK_B": 16,
            "BLOCK_W": block_w,
            "BLOCK_D": 16 if is_wide else 64 if block_w <= 64 else 32,
            "BLOCK_R": 256,
            "num_warps": 8,
        }
    )


def value(channels: int, result: torch.dtype, weight: Tensor) -> dict[str, Any]:
    """Return the configuration of the value kernel: 106 registers in bf16, 63 in fp32, 4 warps."""
    settings = query(channels, result, weight) | {"num_warps": 4}
    return {name: n for name, n in settings.items() if name not in ("BLOCK_R", *MAX_REGISTERS)}


def score_tiles(heads: int, tokens: Tensor) -> dict[str, Any]:
    """Return a tile of 64 patches: 52 registers in bf16, 69 in fp32; 4 warps may spill.

    Four stages would spill in fp32 and for more than sixteen heads.
    """
    narrow = heads <= 16 and tokens.element_size() == 2
    return _dot(heads, tokens) | {
        "BLOCK_N": 64,
        "BLOCK_K": 128 // tokens.element_size(),
        "num_warps": 8,
        "num_stages": 4 if narrow and torch.version.hip is None else 3,
    }


def select(candidates: int, tiles: int) -> tuple[int, int, int]:
    """Return BLOCK_N, BLOCK_T and warps: 40 registers at 256 candidates, 116 at 4,096."""
    block_n = max(16, next_power_of_2(candidates))
    return block_n, next_power_of_2(tiles), 4 if block_n <= 256 else 8


def row(candidates: int, tiles: int) -> tuple[int, int, int]:
    """Return BLOCK_N, BLOCK_T and warps for a part of the row of one image."""
    return min(256, max(16, next_power_of_2(candidates))), next_power_of_2(tiles), 4


def heads_a_step(block_n: int, block_t: int, num_warps: int) -> int:
    """Return how many heads a program of the row kernel loads at once: 8 scores per thread."""
    return max(1, min(16, 256 * num_warps // max(block_n, 2 * block_t)))


def move(candidates: int, element_size: int) -> dict[str, int]:
    """Return a tile of at most 64 candidates: 63 registers with 4 warps (256 take 124 with 8)."""
    block_n = min(64, max(16, next_power_of_2(candidates)))
    return {"BLOCK_N": block_n, "BLOCK_D": 128 // element_size, "num_warps": 4}


def weight_tiles(heads: int, tokens: Tensor) -> dict[str, Any]:
    """Return `score_tiles` without spills: 4 warps (80 registers) in bf16, 8 warps (70) in fp32."""
    narrow = heads <= 16 and tokens.dtype != torch.float32
    return score_tiles(heads, tokens) | {"num_warps": 4 if narrow else 8, "num_stages": 3}


def weigh(tokens: Tensor) -> dict[str, Any]:
    """Return a tile of patches by one cache line, 16 heads: 72 registers in bf16, 113 in fp32."""
    return _dot(16, tokens) | {
        "BLOCK_T": 16,
        "BLOCK_D": 128 // tokens.element_size(),
        "num_warps": 4,
        "num_stages": 3,
    }


def column_sums(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return a tile of 64 x 64 for two-byte types, 32 x 32 for fp32; no prefetch on ROCm."""
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
    """Return why `column_sums` does not support heads of this width, or None."""
    most = MAX_CHANNELS if q.element_size() == 2 else MAX_CHANNELS // 2
    return None if q.shape[3] <= most else f"the kernels support at most {most} channels per head"


def column_mean(queries: int, keys: int) -> dict[str, int]:
    """Return the configuration of the mean kernel; it reads 1,024 entries of the mask per step."""
    block_n = min(256, max(16, next_power_of_2(keys)))
    return {
        "BLOCK_M": min(1024, max(16, next_power_of_2(queries))),
        "BLOCK_G": heads_a_step(block_n, 1, 4),
        "BLOCK_N": block_n,
        "num_warps": 4,
    }


def bipartite_match(channels: int, element_size: int) -> dict[str, int]:
    """Return a tile of 32 x 32 products: 96 registers in bf16 (174 with 64 x 64)."""
    block_c = min(64 if element_size == 2 else 16, next_power_of_2(channels))
    return {"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_C": max(16, block_c), "num_warps": 4}


def order_by_row(tokens: int) -> dict[str, int]:
    """Return BLOCK_N, and BLOCK_M (the number of slots, at most 512): 112 registers."""
    block_m = min(512, max(64, next_power_of_2(tokens)))
    return {"BLOCK_N": 8192 // block_m, "BLOCK_M": block_m, "num_warps": 8}


def merge_gather(element_size: int) -> dict[str, int]:
    """Return a tile of 16 rows by 512 bytes: 69 registers in bf16, 62 in fp32."""
    return {"BLOCK_R": 16, "BLOCK_D": 512 // element_size, "num_warps": 8, "num_stages": 1}


def greedy_selection(tokens: int) -> dict[str, int]:
    """Return BLOCK_N, and BLOCK_T rows of 32 values per thread: 110 registers at 577 tokens."""
    block_n = max(16, next_power_of_2(tokens))
    num_warps = 4 if block_n <= 256 else 8 if block_n <= 1024 else 16
    block_t = max(1, min(16, 1024 * num_warps // block_n))
    return {"BLOCK_T": block_t, "BLOCK_N": block_n, "num_warps": num_warps}


def unsupported(
    *tensors: Tensor, candidates: int = 0, num_prefix_tokens: int = 1, most: int | None = None
) -> str | None:
    """Return why the kernels do not support these tensors and sizes, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if tensors[0].is_cuda and (reason := unsupported_device(tensors[0].device)) is not None:
        return reason
    for t in tensors:
        if t.dtype == torch.float64:
            return "no kernel computes in fp64"
        if t.numel() >= 2**31 * max(1, t.shape[0]):
            return "the kernels support fewer than 2^31 elements per image"
    most = MAX_STREAMED if most is None else most
    if candidates > most:
        return f"the kernels support at most {most:,} candidates per image"
    if num_prefix_tokens > MAX_PREFIX_TOKENS:
        return f"the kernels support at most {MAX_PREFIX_TOKENS} prefix tokens"
    return None


@cache
def unsupported_device(device: torch.device) -> str | None:
    """Return why the kernels do not run on a GPU, or None."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability >= LEAST_CAPABILITY:
        return None
    least, own = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
    return f"the kernels need compute capability {least}, and {device} has {own}"


def dense_rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors, copied where the last stride is not 1; None stays None."""
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors, copied where they are not contiguous; None stays None."""
    return [t if t is None else t.contiguous() for t in tensors]


def addressable(tokens: Tensor) -> Tensor:
    """Return `tokens` (.., N, D), copied if 32-bit offsets within an image or head do not reach."""
    fits = tokens.stride(-1) == 1 and tokens.stride(-2) * tokens.shape[-2] < 2**31
    return tokens if fits else tokens.contiguous()


def run(kernel: Any, grid: tuple[Any, ...], *args: Any, **settings: Any) -> None:
    """Launch a kernel, or add its launch to the graph that PyTorch traces.

    A graph compiles the kernel itself: it takes no options of the compiler but warps and stages. It
    passes a float as fp64, so kernels begin with `tl.cast(.., tl.float32)`.

    Args:
        kernel: what `wrap_triton` returns, which is the kernel itself outside of graphs.
        grid: number of programs in each dimension.
        args: arguments of the kernel.
        settings: its constexpr arguments, and options of Triton's compiler.
    """
    if isinstance(kernel, triton.JITFunction):
        settings |= FUSION
    else:
        settings = {name: value for name, value in settings.items() if name not in MAX_REGISTERS}
    kernel[grid](*args, **settings)


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Return a context in which kernels are launched on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
