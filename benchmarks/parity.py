"""Parity checks: the error of each form of an op against fp64, before it is timed.

    error = largest deviation from fp64 divided by the largest value, for the first and last images.
            Ours must be at most twice that of the forms that it replaces. A form that computes in a
            coarser dtype by design is compared with the form that it replaces in that dtype
    apart = the same deviation, from the eager form and for all images; at most twice that bound

A compiled form may add n fp32 numbers in order where PyTorch adds them pairwise. The error of such
a sum grows with sqrt(n), so its bound is wider by sqrt(n) eps.

A form takes tensors and returns a tuple of tensors; gradients flow from the first to the first.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as autograd_compiler

from benchmarks.cases import COMPILED, DEVICE, ON_GPU
from elip_kernels.testing import Case

OURS = "elip_kernels"
REPLACING = (OURS, "compiled")
FLOOR = 1e-6  # added to the bound

Tensors = tuple[Tensor, ...]
Form = Callable[..., Tensors]


def parity(exact: Tensors, outputs: dict[str, Tensors], *, summed: int = 0) -> dict[str, Any]:
    """Compare the outputs of every form with `exact`, and with the last form that ours replaces.

    Args:
        exact: Outputs in fp64, of all images or of those that `in_fp64` picks.
        outputs: Outputs of all images by form.
        summed: How many numbers are added for each output element; 0 if it does not matter.

    Returns:
        The entry "parity" of the JSON.

    Raises:
        AssertionError: the error of a form is above its bound, or a shape differs.
    """
    images = len(exact[0])
    picked = {
        name: [t[first_and_last(len(t), images)] for t in tensors]
        for name, tensors in outputs.items()
    }
    errors = {name: deviation(output, exact) for name, output in picked.items()}
    compiled = {name: errors.pop(name) for name in ("compiled",) if summed and name in errors}
    checked = check_errors(errors)
    if compiled:
        eps = torch.finfo(torch.float32).eps
        order = {"fp32, summed in order": checked["bound"] / 2 + sqrt(summed) * eps}
        checked |= {"coarser": check_errors(compiled | order, ours=list(compiled))}
    eager = [output for name, output in outputs.items() if name not in REPLACING][-1]
    from_eager = {name: deviation(output, eager) for name, output in outputs.items()}
    for name, error in from_eager.items():
        bound = 2 * (checked["coarser"] if name in compiled else checked)["bound"]
        assert error <= bound, (
            f"parity: expected {name} within {bound:.2e} of the eager form, got {from_eager}"
        )
    return checked | {"apart": largest(from_eager.values())}


def deviation(output: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error of several tensors."""
    return largest(relative_error(*pair) for pair in zip(output, exact, strict=True))


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Return the largest deviation divided by the largest value; NaN if there is a NaN."""
    assert output.shape == exact.shape, f"parity: expected {exact.shape}, got {output.shape}"
    return ((output.double() - exact).abs().max() / exact.abs().max()).item()


def largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if there is one, unlike Python's max."""
    return torch.tensor([*values], dtype=torch.float64).max().item()


def check_errors(errors: dict[str, float], ours: Sequence[str] = REPLACING) -> dict[str, Any]:
    """Check that errors are at most twice those of the replaced forms; return the JSON entry.

    Args:
        errors: Error of each form.
        ours: Names of the forms that replace the others.

    Raises:
        AssertionError: an error is above the bound or not finite.
    """
    replaced = [error for name, error in errors.items() if name not in ours]
    worst, bound = largest(errors.values()), 2 * largest(replaced) + FLOOR
    assert worst <= bound < inf, f"parity: expected errors of at most {bound:.2e}, got {errors}"
    return {"max_abs": worst, "bound": bound, "passed": True, "errors": errors}


def check_coarser_errors(errors: dict[str, float], replaced: float, dtype: str) -> dict[str, Any]:
    """Check forms that compute in a coarser dtype than their tensors; return the JSON entry.

    Args:
        errors: Error of each of these forms.
        replaced: Error of the form that they replace, computed in `dtype`.
        dtype: Name of the coarser dtype.

    Raises:
        AssertionError: an error is above twice `replaced` or not finite.
    """
    checked = check_errors({f"replaced, {dtype}": replaced} | errors, ours=list(errors))
    return checked | {"dtype": dtype}


def on_device(tensors: Sequence[Tensor]) -> Tensors:
    """Move tensors to the measured device, as leaves."""
    return tuple(t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors)


def in_fp64(tensors: Sequence[Tensor], images: int) -> Tensors:
    """Return the first and last images of each tensor in fp64, as leaves."""
    picked = [t.detach()[first_and_last(len(t), images)].double() for t in tensors]
    return tuple(p.requires_grad_(t.requires_grad) for p, t in zip(picked, tensors, strict=True))


def first_and_last(count: int, images: int) -> list[int]:
    """Return the positions of `images` out of `count`: half of them the first, half the last."""
    if images >= count:
        return list(range(count))
    return [*range(images // 2), *range(count - images + images // 2, count)]


def with_compiled(
    forms: dict[str, Form], case: Case, inputs: Tensors
) -> tuple[dict[str, Form], dict[str, str]]:
    """Add the eager form under torch.compile, compiled for `inputs`.

    Returns:
        Forms by name, and the reasons for forms that are left out.
    """
    eager, reason = forms["eager"], why_not_compiled()
    if reason is not None:
        return forms, {"compiled": reason}
    if case not in COMPILED:
        names = " and ".join(map(str, COMPILED))
        return forms, {"compiled": f"compiling takes long, so only {names} is compiled"}
    torch.compiler.reset()
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    # Timing repeats a backward pass on one graph, which the compiled code must allow.
    with autograd_compiler.patch(donated_buffer=False, enable_autograd_cache=False):
        with_gradient(compiled, *inputs, retain_graph=True)
    return {**forms, "compiled": compiled}, {}


def why_not_compiled() -> str | None:
    """Return why torch.compile cannot run on this machine, or None."""
    compiler = os.environ.get("CXX", "g++")
    if ON_GPU or shutil.which(compiler) is not None:
        return None
    return f"no C++ compiler ({compiler}) on this machine"


def with_gradient(
    form: Form, tokens: Tensor, *others: Tensor, retain_graph: bool = False
) -> Tensors:
    """Return a form's outputs and, if tokens need a gradient, the gradient for `.., grad`."""
    if not tokens.requires_grad:
        return form(tokens, *others)
    *others, grad = others
    outputs = form(tokens, *others)
    gradient = torch.autograd.grad(outputs[0], tokens, grad, retain_graph=retain_graph)
    return *(t.detach() for t in outputs), *gradient
