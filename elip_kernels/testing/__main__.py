"""Check every public op on this machine against its PyTorch implementation in fp64.

    python -m elip_kernels.testing [--device DEVICE]

The device is the CUDA or ROCm GPU if there is one, else the CPU. With TRITON_INTERPRET=1 the
kernels run on the CPU in Triton's interpreter. The exit status is 1 if an op fails.

An op passes if, for every output and gradient, integers are equal and the largest error, relative
to the largest value, is at most the bound: twice the error of the PyTorch implementation in the
same dtype, or a floor for the order of sums.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from math import inf
from unittest.mock import patch

import torch
from torch import Tensor

import elip_kernels
from elip_kernels._example import EXAMPLES, Arguments, Example, Sizes, map_tensors
from elip_kernels._operator import OPERATORS
from elip_kernels._triton import is_interpreted
from elip_kernels.testing import kernels_on_cpu

Outputs = tuple[Tensor, ...]

# Floors: kernels sum in another order, and split fp32 operands of bf16 products in two terms.
FLOORS = {torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 1e-5}
SHAPE = (2, 197, 384, 127, 6)  # B, N, D, K, H of a ViT-S/16
SMALL_SHAPE = (1, 19, 32, 11, 2)  # for the interpreter


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check every op, write the table and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elip_kernels.testing", description=__doc__)
    default = "cuda" if torch.cuda.is_available() and not is_interpreted() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    device = parser.parse_args(arguments).device
    shape, dtypes = SHAPE, list(FLOORS)
    if is_interpreted():
        shape = SMALL_SHAPE
        dtypes.remove(torch.bfloat16)  # the interpreter truncates to bf16 instead of rounding
    rows = [check(name, dtype, device, shape) for name in EXAMPLES for dtype in dtypes]
    sys.stdout.write(f"{device}, torch {torch.__version__}, B N D K H = {shape}\n")
    for row in [("op", "dtype", "runs", "error", "bound", "ok"), *rows]:
        sys.stdout.write("{:<26}{:<10}{:<9}{:>9}{:>9}  {}\n".format(*row))
    failed = sum(row[-1] != "yes" for row in rows)
    sys.stdout.write(f"{len(rows) - failed} of {len(rows)} checks passed\n")
    return int(failed > 0)


def check(
    name: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int, int, int]
) -> tuple[str, str, str, str, str, str]:
    """Check a public op on its example of `shape`, (B, N, D, K, H); return a row of the table."""
    names, example = (name, str(dtype).removeprefix("torch.")), EXAMPLES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arguments = example.arguments(Sizes(*shape, dtype))
    try:
        outputs, form = _run(example, map_tensors(lambda t: t.to(device), arguments))
    except Exception as failure:  # compilers and drivers raise many types
        return *names, "-", "-", "-", f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    outputs = tuple(t.cpu() for t in outputs)
    wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, arguments)
    exact, rounded = (_pytorch(example, values, outputs) for values in (wide, arguments))
    results = [
        (_error(output, right), max(2 * _error(same_dtype, right), FLOORS[dtype]))
        for output, right, same_dtype in zip(outputs, exact, rounded, strict=True)
    ]
    error, bound = max(results, key=lambda result: result[0] / result[1])
    passed = all(error <= bound < inf for error, bound in results)  # False for NaN
    return *names, form, f"{error:.1e}", f"{bound:.1e}", "yes" if passed else "NO"


def _run(example: Example, arguments: Arguments) -> tuple[Outputs, str]:
    """Run an op; return its outputs, and "kernels" or "PyTorch"."""
    first, *_ = arguments.values()
    interpreted = is_interpreted() and first.device.type == "cpu"
    operators = OPERATORS.values()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", elip_kernels.FallbackWarning)  # the table shows the form
        stack.enter_context(kernels_on_cpu() if interpreted else nullcontext())
        launchers, references = (
            [stack.enter_context(patch.object(o, form, wraps=getattr(o, form))) for o in operators]
            for form in ("launcher", "reference")
        )
        outputs = example.outputs(arguments)
    ran = any(mock.called for mock in launchers) and not any(mock.called for mock in references)
    return outputs, "kernels" if ran else "PyTorch"


def _pytorch(example: Example, arguments: Arguments, outputs: Outputs) -> Outputs:
    """Return the outputs of the PyTorch implementation in the dtypes of `arguments`."""
    with elip_kernels.use_pytorch_ops():
        expected = example.outputs(arguments)
        if example.function is not elip_kernels.score_reduce:
            return expected
        # Nearly equal scores may be selected differently: select by the row that was measured.
        *_, row, _ = expected
        *_, measured_row, _ = outputs
        selected = example.outputs(arguments | {"row": measured_row.to(row.dtype)})
        return *selected[:-2], row, selected[-1]


def _error(output: Tensor, exact: Tensor) -> float:
    if not exact.is_floating_point():
        return 0.0 if torch.equal(output, exact) else inf
    return ((output.double() - exact).abs().max() / exact.abs().max()).item()


if __name__ == "__main__":
    sys.exit(main())
