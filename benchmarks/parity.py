"""Forms of one op, and how far each is from fp64; what is not as near as it must be is not timed.

    error = largest deviation from fp64 over the largest value; ours at most twice that of the forms
            that it replaces

A form takes tensors and returns a tuple of tensors; gradients flow from the first to the first.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DEVICE

OURS = "elip_kernels"
FLOOR = 1e-6  # of the bound

Tensors = tuple[Tensor, ...]
Form = Callable[..., Tensors]


def parity(exact: Tensors, outputs: dict[str, Tensors]) -> dict[str, Any]:
    """Hold the outputs of every form to `exact`, in fp64 and of the first images; see `judged`."""
    errors = {
        name: max(relative_error(*pair) for pair in zip(output, exact, strict=True))
        for name, output in outputs.items()
    }
    return judged(errors)


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Largest deviation over the largest value; `exact` may be of the first images only."""
    return ((output[: len(exact)].double() - exact).abs().max() / exact.abs().max()).item()


def judged(errors: dict[str, float], ours: Sequence[str] = (OURS, "compiled")) -> dict[str, Any]:
    """What goes into the JSON of errors by form.

    Raises:
        AssertionError: a form is further off than twice those that `ours` replace.
    """
    replaced = [error for name, error in errors.items() if name not in ours]
    worst, bound = max(errors.values()), 2 * max(replaced) + FLOOR
    assert worst <= bound, f"parity: expected errors of at most {bound:.2e}, got {errors}"
    return {"max_abs": worst, "bound": bound, "passed": worst <= bound, "errors": errors}


def on_device(tensors: Sequence[Tensor]) -> Tensors:
    """Leaves on the device that is measured."""
    return tuple(t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors)


def in_fp64(tensors: Sequence[Tensor], images: int) -> Tensors:
    """Leaves in fp64, the first images only."""
    return tuple(t.detach()[:images].double().requires_grad_(t.requires_grad) for t in tensors)


def with_compiled(
    forms: dict[str, Form], direction: str = "forward"
) -> tuple[dict[str, Form], dict[str, str]]:
    """The eager form under torch.compile too -> forms, and why one is left out, by name."""
    if direction == "backward":
        return forms, {"compiled": "its backward pass gives its buffers away: it runs only once"}
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return forms, {"compiled": f"no C++ compiler ({compiler}) on this machine"}
    torch.compiler.reset()
    compiled = torch.compile(forms["eager"], fullgraph=True, dynamic=False)
    return {**forms, "compiled": compiled}, {}


def with_gradient(form: Form, tokens: Tensor, *others: Tensor) -> Tensors:
    """A form's outputs from `tokens, ..` and, where tokens take a gradient, that of `.., grad`."""
    if not tokens.requires_grad:
        return form(tokens, *others)
    *others, grad = others
    outputs = form(tokens, *others)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs[0], tokens, grad)
