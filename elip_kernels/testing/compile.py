"""Compile a kernel for an architecture that need not be there, and read what its code says."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elip_kernels import launch
from elip_kernels._triton import triton
from elip_kernels.testing import _module


@dataclass(frozen=True)
class Compiled:
    """What the compiled code of one kernel says; bytes for stack, local and shared memory."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: Counter

    def share_128(self, kind: str) -> tuple[int, int]:
        """(128-bit accesses, all) among global loads ('LDG') or stores ('STG')."""
        mine = {name: n for name, n in self.instructions.items() if name.split(".")[0] == kind}
        return sum(n for name, n in mine.items() if name.endswith(".128")), sum(mine.values())


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int = 3,
) -> Compiled:
    """Compile for an NVIDIA `arch` (80, 90, 100) without a GPU.

    Args:
        kernel: a `@triton.jit` function, not decorated for the interpreter.
        signature: type of each run-time argument; ':16' marks divisibility, pointers have it.
        constants: the constexpr arguments.
        arch: compute capability times ten.
        num_warps, num_stages: of the launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    types = {n: "constexpr" if n in constants else signature[n].split(":")[0] for n in names}
    aligned = [n for n in names if n in signature and signature[n].startswith("*")]
    aligned += [n for n in names if signature.get(n, "").endswith(":16")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _read_cubin(code.asm["cubin"], code.metadata.shared)


def _read_cubin(cubin: bytes, shared: int) -> Compiled:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        sass = run(str(tools / "nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump: expected a resource usage line, got {usage!r}")
    registers, stack, local = map(int, found.groups())
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    return Compiled(registers, stack, local, shared, Counter(map(_short, code)))


def _short(instruction: str) -> str:
    """LDG.E.128.CONSTANT -> LDG.128; other instructions by their first word."""
    name = instruction.split(".")[0]
    width = next((w for w in instruction.split(".") if w in ("64", "128")), "")
    return f"{name}.{width}" if name in ("LDG", "STG") and width else name


def compile_reduce(
    arch: int, *, candidates: int, dtype: str, has_mask: bool = False, merge: bool = True
) -> tuple[Compiled, Compiled]:
    """`reduce` forward and backward as launched for `candidates` patches of 'bf16' or 'fp32'."""
    module, size = _module("reduce"), 4 if dtype == "fp32" else 2
    tokens, ints = f"*{dtype}", {"N": "i32", "K": "i32", "D": "i32:16", "R": "i32"}
    block_n, block_d, num_warps = launch.reduce_forward(candidates, size)
    forward = compile_kernel(
        module._reduce_fwd_kernel,
        {"tokens_ptr": tokens, "scores_ptr": "*fp32", "out_ptr": tokens, "kept_ptr": "*i64"}
        | {"weights_ptr": "*fp32", "slots_ptr": "*i32", "mask_ptr": "*i1"}
        | {"stride_tb": "i32:16", "stride_tn": "i32:16", "stride_sb": "i32", "stride_mb": "i32"}
        | ints,
        {"P": 1, "MERGE": merge, "NORMALIZE": True, "HAS_MASK": has_mask, "EPSILON": 1e-6}
        | {"BLOCK_N": block_n, "BLOCK_D": block_d}
        | ({} if has_mask else {"mask_ptr": None}),
        arch=arch,
        num_warps=num_warps,
    )
    block_n, block_d, num_warps = launch.reduce_backward(size)
    backward = compile_kernel(
        module._reduce_bwd_kernel,
        {"grad_out_ptr": tokens, "slots_ptr": "*i32", "weights_ptr": "*fp32", "grad_ptr": tokens}
        | ints,
        {"MERGE": merge, "BLOCK_N": block_n, "BLOCK_D": block_d},
        arch=arch,
        num_warps=num_warps,
    )
    return forward, backward


def compile_rows(
    arch: int, *, num_tokens: int, heads: int, dtype: str
) -> tuple[Compiled, Compiled]:
    """The absorbed and the generic CLS row as launched for tokens of 'bf16' or 'fp32'."""
    module, tokens = _module("cls_attention"), f"*{dtype}"
    example = torch.empty(0, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    ints = {"N": "i32", "D": "i32:16", "H": "i32"}
    settings = launch.score(num_tokens - 1, heads, example) | {"HAS_REST": dtype != "fp32"}
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    absorbed = compile_kernel(
        module._from_tokens_kernel,
        {"tokens_ptr": tokens, "query_ptr": tokens, "rest_ptr": tokens, "cls_score_ptr": "*fp32"}
        | {"out_ptr": "*fp32", "stride_tb": "i32:16", "stride_tn": "i32:16", "eps": "fp32"}
        | ints,
        settings,
        arch=arch,
        **options,
    )
    block_n, block_d, num_warps = launch.cls_attention(num_tokens)
    strides = ("stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_kn")
    generic = compile_kernel(
        module._cls_attention_kernel,
        {"q_ptr": tokens, "k_ptr": tokens, "out_ptr": "*fp32", "scale": "fp32"}
        | {"stride_mb": "i32"}
        | dict.fromkeys(strides, "i32:16")
        | ints,
        {"mask_ptr": None, "HAS_MASK": False, "BLOCK_N": block_n, "BLOCK_D": block_d},
        arch=arch,
        num_warps=num_warps,
    )
    return absorbed, generic


def compile_score_reduce(
    arch: int, *, num_tokens: int, heads: int, dtype: str
) -> tuple[Compiled, Compiled]:
    """The two kernels of `score_reduce` as launched for tokens of 'bf16' or 'fp32'."""
    module, tokens = _module("score_reduce"), f"*{dtype}"
    example = torch.empty(0, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    outputs = {"weights_ptr": "*fp32", "slots_ptr": "*i32", "stride_tb": "i32:16"}
    outputs |= {"stride_tn": "i32:16", "N": "i32", "K": "i32", "D": "i32:16"}
    settings = launch.score(num_tokens - 1, heads, example) | {"HAS_REST": dtype != "fp32"}
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    select = compile_kernel(
        module._score_select_kernel,
        {"tokens_ptr": tokens, "query_ptr": tokens, "rest_ptr": tokens, "cls_score_ptr": "*fp32"}
        | {"row_ptr": "*fp32", "kept_ptr": "*i64", "H": "i32", "eps": "fp32"}
        | outputs,
        settings | {"MERGE": True, "NORMALIZE": True, "EPSILON": 1e-6},
        arch=arch,
        **options,
    )
    block_n, block_d, num_warps = launch.reduce_forward(num_tokens - 1, example.element_size())
    move = compile_kernel(
        module._move_kernel,
        {"tokens_ptr": tokens, "out_ptr": tokens} | outputs,
        {"MERGE": True, "BLOCK_N": block_n, "BLOCK_D": block_d},
        arch=arch,
        num_warps=num_warps,
    )
    return select, move
