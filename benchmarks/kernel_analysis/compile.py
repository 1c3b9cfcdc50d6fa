"""Compile the launches of an op for any architecture, and read the compiled code.

    recorded_launches(arch)         runs launchers on CPU tensors and records the launches
    compile_launch(recorded, arch)  compiles a recorded launch through Triton's own warm-up, which
                                    specialises on the arguments as on a device
    Compiled                        registers, spills, shared memory, occupancy, accesses

An architecture is 80, 86, 89, 90, 100 or 120 (compute capability times ten) or "gfx942".
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from elip_kernels._triton import is_interpreted, triton
from elip_kernels._validate import message
from elip_kernels.testing import launchers_on_cpu

Arch = int | str
# Bytes of shared memory of an SM, or LDS of a CU. A block on an SM uses 1 KB for the system.
SHARED_MEMORY = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024, 90: 228 * 1024}
SHARED_MEMORY |= {100: 228 * 1024, 120: 100 * 1024, "gfx942": 64 * 1024}
# Most warps and blocks of an SM or CU.
RESIDENT = {86: (48, 16), 89: (48, 24), 120: (48, 24), "gfx942": (32, 16)}
RESIDENT_DEFAULT = (64, 32)
BLOCK_OVERHEAD = 1024
ARCHITECTURES: tuple[Arch, ...] = tuple(SHARED_MEMORY)


@dataclass(frozen=True)
class RecordedLaunch:
    """One `kernel[grid](*args, **options)`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the kernel."""
        return self.kernel.__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """Return all arguments by parameter name, including constexprs."""
        given = {name: v for name, v in self.options.items() if name in self.kernel.arg_names}
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | given


@dataclass(frozen=True)
class Compiled:
    """Figures of the compiled code of one kernel.

    Attributes:
        registers: per thread; on AMD all vector registers, including accumulation registers.
        stack: bytes per thread; on AMD the scratch memory.
        local: bytes of local memory per thread.
        spills: instructions that access local memory; on AMD spilled registers.
        shared: bytes of shared memory.
        occupancy: warps that an SM or CU runs at once, and what limits them.
        instructions: count of each mnemonic in the code; the body of a loop counts once.
        loads: count of global loads of each width in bits.
        stores: count of global stores of each width in bits.
        products_in_loop: the most products into Blackwell's tensor memory in the body of a loop.
    """

    num_warps: int
    num_stages: int
    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    occupancy: tuple[int, str]
    instructions: Counter[str]
    loads: Counter[int]
    stores: Counter[int]
    products_in_loop: int

    def wide_bytes(self) -> tuple[int, int]:
        """Return the bytes that a thread loads and stores by accesses of 128 bits or more."""
        loads, stores = (
            sum(bits // 8 * n for bits, n in accesses.items() if bits >= 128)
            for accesses in (self.loads, self.stores)
        )
        return loads, stores

    def wide_share(self) -> float:
        """Return the share of all bytes that is moved by accesses of 128 bits or more."""
        total = sum(bits // 8 * n for bits, n in (self.loads + self.stores).items())
        return sum(self.wide_bytes()) / total if total else 1.0


@contextmanager
def recorded_launches(arch: Arch) -> Iterator[list[RecordedLaunch]]:
    """Record the launches of ops on CPU tensors, as on `arch`, without running them.

    Outputs stay unwritten. Positions are zero and thus within bounds; their values are not checked.
    `torch.version.hip` is that of `arch`.

    Raises:
        RuntimeError: Triton was imported with TRITON_INTERPRET=1.
    """
    if is_interpreted():
        raise RuntimeError("unset TRITON_INTERPRET before importing elip_kernels")
    launches: list[RecordedLaunch] = []

    def record(
        kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> None:
        launches.append(RecordedLaunch(kernel, grid, args, options))

    rocm = "rocm" if _is_amd(arch) else None
    with (
        patch.object(triton.JITFunction, "run", record),
        patch.object(torch.version, "hip", rocm),
        patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        patch("elip_kernels._validate.is_readable", lambda tensor: False),
        launchers_on_cpu(),
    ):
        yield launches


def compile_launch(recorded: RecordedLaunch, arch: Arch) -> Compiled:
    """Compile a recorded launch for `arch`, specialised as in a real launch."""
    absent = SimpleNamespace(
        get_current_target=lambda: target_of(arch),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    with patch.object(triton.runtime.driver, "_active", absent):
        code = recorded.kernel.warmup(*recorded.args, grid=recorded.grid, **recorded.options)
    return _read(code, arch)


def _is_amd(arch: Arch) -> bool:
    if arch not in ARCHITECTURES:
        raise ValueError(message("arch", f"one of {ARCHITECTURES}", arch))
    return isinstance(arch, str)


def target_of(arch: Arch) -> Any:
    """Return an architecture as Triton describes it."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if _is_amd(arch) else GPUTarget("cuda", arch, 32)


@cache  # Triton returns the same code for launches that differ in sizes alone
def _read(code: Any, arch: Arch) -> Compiled:
    """Return the figures of a kernel that Triton compiled."""
    asm, shared, num_warps = code.asm, code.metadata.shared, code.metadata.num_warps
    facts = _read_amdgcn(asm["amdgcn"]) if _is_amd(arch) else _read_cubin(asm["cubin"])
    bodies = [rest.partition("scf.yield")[0] for rest in asm["ttgir"].split("scf.for ")[1:]]
    facts["products_in_loop"] = max((body.count("ttng.tc_gen5_mma ") for body in bodies), default=0)
    facts["occupancy"] = warps_at_once(arch, facts["registers"], shared, num_warps)
    return Compiled(num_warps, code.metadata.num_stages, shared=shared, **facts)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
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
    words = [instruction.split(".") for instruction in code if instruction != "NOP"]
    mnemonics = Counter(word[0] for word in words)
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": mnemonics["LDL"] + mnemonics["STL"],
        "instructions": mnemonics,
        "loads": Counter(_sass_bits(w) for w in words if w[0] in ("LDG", "LDGSTS")),
        "stores": Counter(_sass_bits(w) for w in words if w[0] == "STG"),
    }


def _sass_bits(words: list[str]) -> int:
    """Return the width of an access: LDG.E.128.CONSTANT -> 128, LDG.E.U16 -> 16, LDG.E -> 32."""
    return next(
        (int(w.lstrip("US")) for w in words if re.fullmatch(r"[US]?(8|16|64|128|256)", w)), 32
    )


GCN_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    def metadata(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", assembly, re.M)
        if found is None:
            raise ValueError(f"amdgcn: expected .{key} in the metadata, got none")
        return int(found[1])

    def accesses(kind: str) -> Counter[int]:
        pattern = rf"^\s+(?:global|buffer|flat)_{kind}_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)"
        return Counter(GCN_BITS[width] for width in re.findall(pattern, assembly, re.M))

    mnemonics = Counter(re.findall(r"^\s+((?:v|s|ds|global|buffer|flat)_\w+)", assembly, re.M))
    del mnemonics["s_nop"]
    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "local": 0,
        "spills": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        "instructions": mnemonics,
        "loads": accesses("load"),
        "stores": accesses("store"),
    }


def warps_at_once(arch: Arch, registers: int, shared: int, num_warps: int) -> tuple[int, str]:
    """Return the warps that an SM or CU runs at once, and the resource that limits them.

    NVIDIA: 4 x 16,384 registers, allocated per warp in units of 256; shared memory in units of
    128 bytes, plus 1 KB per block for the system. CDNA3: 4 x 512 vector registers per lane, in
    units of 8 per wave; 64 KB of LDS. Limits of warps and blocks are from the CUDA programming
    guide and the CDNA3 ISA.
    """
    warps, blocks = RESIDENT.get(arch, RESIDENT_DEFAULT)
    if _is_amd(arch):
        memory = SHARED_MEMORY[arch] // max(1, shared)
        by_registers = 4 * (512 // _round_up(registers, 8))
    else:
        memory = SHARED_MEMORY[arch] // _round_up(shared + BLOCK_OVERHEAD, 128)
        by_registers = 4 * (16384 // _round_up(registers * 32, 256))
    limits = {"warps": warps // num_warps, "blocks": blocks}
    limits |= {"registers": by_registers // num_warps, "shared": memory}
    limit = min(limits, key=limits.__getitem__)
    return limits[limit] * num_warps, limit


def _round_up(n: int, unit: int) -> int:
    return max(1, -(-n // unit)) * unit
