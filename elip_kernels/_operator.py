"""Operators `torch.ops.elip.*`: a PyTorch form for every device, and kernels for CUDA and ROCm.

They are defined with `torch.library.Library`, which costs a call less than `custom_op` does: at
small batches the host's microseconds are as many as the kernel's.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from elip_kernels.autocast import without_autocast

LIBRARY = torch.library.Library("elip", "DEF")
OPERATORS: dict[str, "Operator"] = {}
_SAID: set[tuple[str, str]] = set()
_is_decomposed = False


@contextmanager
def use_pytorch_ops() -> Iterator[None]:
    """Inside, every op of every thread is its PyTorch form: a capture needs no `elip::*` to run.

    In inference, for a runtime without Python such as AOTInductor's: the graph holds aten's ops
    alone, and none of our kernels::

        with torch.no_grad(), elip_kernels.use_pytorch_ops():
            program = torch.export.export(model, (images,))
        package = torch._inductor.aoti_compile_and_package(program)

    `torch.onnx.export(model, ..)` does so by itself.
    """
    global _is_decomposed
    before, _is_decomposed = _is_decomposed, True
    try:
        yield
    finally:
        _is_decomposed = before


def exports_onnx() -> bool:
    """Inside `torch.onnx.export`, which translates aten's ops and none of ours."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def is_differentiated() -> bool:
    """Inside torch.func.grad, jvp and the like, or forward-mode AD, which know aten's ops alone;
    vmap by itself calls an op sample by sample. In a graph it is as where the graph is made.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return forward_ad._current_level >= 0
    stack = torch._C._functorch.get_interpreter_stack()
    return any(each.key() in (TransformType.Grad, TransformType.Jvp) for each in stack)


# As torch.compiler.assume_constant_result says it, which imports torch._dynamo.
is_differentiated._dynamo_marked_constant = True


class Operator:
    """`torch.ops.elip.NAME`; calling it calls the op.

    Args:
        name: of the op, without namespace.
        reference: its PyTorch form, for every device; the annotations make the schema.
        launcher: its form by kernels, same arguments.
        unsupported: why the kernels do not take these arguments, or None; the PyTorch form takes all.
        fake: its outputs, unwritten, same arguments.
        flops: its FLOP formula, of the shapes of its tensors.
        backward, save: as `torch.library.register_autograd` takes them; without them the outputs
            take no gradient.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        launcher: Callable[..., Any],
        unsupported: Callable[..., str | None],
        fake: Callable[..., Any],
        flops: Callable[..., int],
        backward: Callable[..., Any] | None = None,
        save: Callable[..., None] | None = None,
    ) -> None:
        self.name, self.reference, self.launcher = name, reference, launcher
        self.unsupported = unsupported
        schema = torch.library.infer_schema(reference, mutates_args=())
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self.decomposition = without_autocast(reference)
        LIBRARY.impl(name, self.decomposition, "CompositeExplicitAutograd")
        LIBRARY.impl(name, without_autocast(self.on_device), "CUDA")
        torch.library.register_fake(f"elip::{name}", fake, lib=LIBRARY)
        if backward is None:
            backward, save = _no_gradient(reference), _mark_outputs
        torch.library.register_autograd(f"elip::{name}", backward, setup_context=save, lib=LIBRARY)
        register_flop_formula(getattr(torch.ops.elip, name))(flops)
        self.overload = getattr(torch.ops.elip, name).default
        OPERATORS[name] = self

    def __call__(self, *args: Any) -> Any:
        if _is_decomposed or exports_onnx() or is_differentiated():
            return self.decomposition(*args)
        return self.overload(*args)

    def on_device(self, *args: Any) -> Any:
        """The form of CUDA and ROCm tensors; warns once where it is not the kernels'."""
        reason = self.unsupported(*args)
        if reason is None:
            return self.launcher(*args)
        _warn_once(self.name, reason, tuple(args[0].shape))
        return self.reference(*args)


class FallbackWarning(UserWarning):
    """An op runs its PyTorch form on a device that has kernels."""


def _warn_once(name: str, reason: str, shape: tuple[int, ...]) -> None:
    """Once for each op and reason, of whatever shape."""
    if (name, reason) not in _SAID:
        _SAID.add((name, reason))
        message = f"elip::{name} of {shape} runs its PyTorch form: {reason}"
        warnings.warn(message, FallbackWarning, stacklevel=3)


def _no_gradient(reference: Callable[..., Any]) -> Callable[..., Any]:
    count = len(inspect.signature(reference).parameters)
    return lambda ctx, *grads: (None,) * count


def _mark_outputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*((output,) if torch.is_tensor(output) else output))
