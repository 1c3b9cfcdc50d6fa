"""Test cases, inputs, and switches that run the kernels on CPU tensors.

With TRITON_INTERPRET=1, set before triton is imported, the interpreter runs a kernel on CPU
tensors. `kernels_on_cpu` runs them there and counts the launches. The interpreter
does not show

    rounding   of tensor cores: two-byte and tf32x3 products are computed in fp32, and exponentials
               by NumPy instead of ex2.approx
    order      programs and threads run one after the other: no races, no missing barriers
    code       registers, spills and access widths: see `python -m benchmarks.kernel_analysis`
    time       measured by `benchmarks/gpu.sh`

`python -m elip_kernels.testing` checks every op on the device of this machine against fp64.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import elip_kernels  # noqa: F401  (its operators and examples)
from elip_kernels import launch
from elip_kernels._example import EXAMPLES, Sizes
from elip_kernels._operator import OPERATORS, Operator
from elip_kernels._triton import is_interpreted


@dataclass(frozen=True)
class Case:
    """One shape of `reduce`; its string names the sizes."""

    B: int
    N: int
    D: int
    K: int
    dtype: torch.dtype = torch.float32
    num_prefix_tokens: int = 1

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return f"B{self.B}-N{self.N}-D{self.D}-K{self.K}-{dtype.get(self.dtype, 'fp64')}"

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return tokens (B, N, D) from N(0, 1), and scores (B, N-p): a softmax row without CLS."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(self.B, self.N, self.D, generator=generator).to(self.dtype)
        logits = torch.randn(self.B, self.N, generator=generator)
        return tokens, logits.softmax(-1)[:, self.num_prefix_tokens :]


WITH_KERNELS = [name for name, example in EXAMPLES.items() if example.has_kernels]
# (N, K) of images of 224/16, 224/14 and 336/14 when 65% of the patches stay.
REAL_CASES = ((197, 127), (257, 166), (577, 374))
BATCHES = (2, 128)  # small and large batches may use different kernels


def call(
    name: str, B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Call an op on its example; return the tensors of its result, and last the gradient."""
    example = EXAMPLES[name]
    return example.outputs(example.arguments(Sizes(B, N, D, K, H, dtype)))


class RecordedCalls(TorchDispatchMode):
    """Record the name and the arguments of every call of this project's ops in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; record it if it is one of `torch.ops.elip`."""
        if func.namespace == "elip":
            self.calls.append((func.name().split("::")[1].partition(".")[0], args))
        return func(*args, **(kwargs or {}))


REAL_SHAPES = [(257, 230), (257, 166), (257, 102), (197, 176), (197, 127), (197, 78), (50, 32)]
UGLY_SHAPES = [(38, 1), (38, 36), (18, 9), (3, 1), (65, 64)]


def cases(B: int, D: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Return the shapes of real models and some edge cases: N odd, K = 1, K = N - 2."""
    shapes = REAL_SHAPES + UGLY_SHAPES
    return [Case(B, N, D, K, dtype) for dtype in dtypes for N, K in shapes if K < N - 1]


@contextmanager
def kernels_on_cpu() -> Iterator[Counter]:
    """Run the Triton launchers on CPU tensors inside the block; yield the launches by op.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1.
    """
    if not is_interpreted():
        raise RuntimeError("set TRITON_INTERPRET=1 before importing elip_kernels")
    with launchers_on_cpu() as launches:
        yield launches


@contextmanager
def launchers_on_cpu() -> Iterator[Counter]:
    """Take the CPU as a device with kernels inside the block; yield the launches by op."""
    launches: Counter = Counter()
    own = Operator.launch

    def counted(operator: Operator, *args: Any) -> Any:
        launches[f"elip::{operator.name}"] += 1
        return own(operator, *args)

    with ExitStack() as stack:
        stack.enter_context(patch.object(launch, "DEVICES", {*launch.DEVICES, "cpu"}))
        stack.enter_context(patch.object(Operator, "launch", counted))
        for operator in OPERATORS.values():
            stack.enter_context(operator.op.set_kernel_enabled("cpu", enabled=False))
        yield launches
