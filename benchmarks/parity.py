"""Forms of one op, and how far each is from fp64; what is not as near as it must be is not timed.

    error = largest deviation from fp64 over the largest value; ours at most twice that of the forms
            that it replaces, for the first and the last images. A form that computes in a coarser
            dtype by design is held to twice the error of what it replaces in that dtype
    apart = the same from the eager form instead of fp64, for all images; at most twice that bound

A compiled form may add n numbers in fp32 one after another where PyTorch adds them pairwise: the
error of such a sum grows as sqrt(n), so that its bound is wider by sqrt(n) eps.

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
FLOOR = 1e-6  # of the bound

Tensors = tuple[Tensor, ...]
Form = Callable[..., Tensors]


def parity(exact: Tensors, outputs: dict[str, Tensors], *, summed: int = 0) -> dict[str, Any]:
    """Hold the outputs of every form to `exact`, and to those of the last form that ours replaces.

    Args:
        exact: in fp64, of all images or of those that `in_fp64` picks.
        outputs: by form, of all images.
        summed: n, how many numbers each output element is a sum of.

    Returns:
        What goes into the JSON.

    Raises:
        AssertionError: a form is further off than it may be, or of another shape.
    """
    images = len(exact[0])
    picked = {name: [t[ends(len(t), images)] for t in tensors] for name, tensors in outputs.items()}
    errors = {name: deviation(output, exact) for name, output in picked.items()}
    compiled = {name: errors.pop(name) for name in ("compiled",) if summed and name in errors}
    held = judged(errors)
    if compiled:
        eps = torch.finfo(torch.float32).eps
        order = {"fp32, summed in order": held["bound"] / 2 + sqrt(summed) * eps}
        held |= {"coarser": judged(compiled | order, ours=list(compiled))}
    eager = [output for name, output in outputs.items() if name not in REPLACING][-1]
    apart = {name: deviation(output, eager) for name, output in outputs.items()}
    worst = largest(apart.values())
    bound = 2 * max(held["bound"], held.get("coarser", held)["bound"])
    assert worst <= bound, f"parity: expected all images {bound:.2e} apart at most, got {apart}"
    return held | {"apart": worst}


def deviation(output: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of several tensors."""
    return largest(relative_error(*pair) for pair in zip(output, exact, strict=True))


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Largest deviation over the largest value; NaN where there is one."""
    assert output.shape == exact.shape, f"parity: expected {exact.shape}, got {output.shape}"
    return ((output.double() - exact).abs().max() / exact.abs().max()).item()


def largest(values: Iterable[float]) -> float:
    """Find the largest value; unlike Python's max, NaN where there is one."""
    return torch.tensor([*values], dtype=torch.float64).max().item()


def judged(errors: dict[str, float], ours: Sequence[str] = REPLACING) -> dict[str, Any]:
    """Return what goes into the JSON of errors by form.

    Raises:
        AssertionError: a form is further off than twice those that `ours` replace, or not finite.
    """
    replaced = [error for name, error in errors.items() if name not in ours]
    worst, bound = largest(errors.values()), 2 * largest(replaced) + FLOOR
    assert worst <= bound < inf, f"parity: expected errors of at most {bound:.2e}, got {errors}"
    return {"max_abs": worst, "bound": bound, "passed": True, "errors": errors}


def judged_coarser(errors: dict[str, float], replaced: float, dtype: str) -> dict[str, Any]:
    """Return what goes into the JSON of forms that compute in `dtype`, which is coarser than the
    dtype of their tensors.

    Args:
        errors: of these forms.
        replaced: the error of the form that they replace, computed in `dtype`.

    Raises:
        AssertionError: a form is further off than twice `replaced`, or not finite.
    """
    held = judged({f"replaced, {dtype}": replaced} | errors, ours=list(errors))
    return held | {"dtype": dtype}


def on_device(tensors: Sequence[Tensor]) -> Tensors:
    """Move tensors to the device that is measured, as leaves."""
    return tuple(t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors)


def in_fp64(tensors: Sequence[Tensor], images: int) -> Tensors:
    """Pick so many images, the first and the last, in fp64 -> leaves."""
    picked = [t.detach()[ends(len(t), images)].double() for t in tensors]
    return tuple(p.requires_grad_(t.requires_grad) for p, t in zip(picked, tensors, strict=True))


def ends(count: int, images: int) -> list[int]:
    """Positions of `images` among `count`, half of them the first and half the last."""
    if images >= count:
        return list(range(count))
    return [*range(images // 2), *range(count - images + images // 2, count)]


def with_compiled(
    forms: dict[str, Form], case: Case, inputs: Tensors
) -> tuple[dict[str, Form], dict[str, str]]:
    """The eager form under torch.compile too, compiled for `inputs` -> forms, and why one is left
    out, by name."""
    eager, compiler = forms["eager"], os.environ.get("CXX", "g++")
    if not ON_GPU and shutil.which(compiler) is None:
        return forms, {"compiled": f"no C++ compiler ({compiler}) on this machine"}
    if case not in COMPILED:
        return forms, {"compiled": f"only {' and '.join(map(str, COMPILED))} are: it takes long"}
    torch.compiler.reset()
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    # A backward pass may go its graph again where the first one that is compiled does.
    with autograd_compiler.patch(donated_buffer=False, enable_autograd_cache=False):
        with_gradient(compiled, *inputs, retain_graph=True)
    return {**forms, "compiled": compiled}, {}


def with_gradient(
    form: Form, tokens: Tensor, *others: Tensor, retain_graph: bool = False
) -> Tensors:
    """A form's outputs from `tokens, ..` and, where tokens take a gradient, that of `.., grad`."""
    if not tokens.requires_grad:
        return form(tokens, *others)
    *others, grad = others
    outputs = form(tokens, *others)
    gradient = torch.autograd.grad(outputs[0], tokens, grad, retain_graph=retain_graph)
    return *(t.detach() for t in outputs), *gradient
