"""Operators `torch.ops.elip.*`: PyTorch on every device, Triton kernels on CUDA and ROCm.

Each is a `torch.library.triton_op`, so `torch.compile` gets the launches of its kernels in place of
the op. Where there is no launch to trace (another device, sizes that the graph does not know), the
graph has `elip::NAME_opaque`, which decides when it runs.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import repeat
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from elip_kernels import launch
from elip_kernels._switch import ProcessSwitch
from elip_kernels._triton import HAS_TRITON, OutOfResources, is_interpreted
from elip_kernels.autocast import no_autocast, without_autocast
from elip_kernels.differentiation import is_differentiated

OPERATORS: dict[str, "Operator"] = {}
_DECOMPOSED, _EXPORTED = ProcessSwitch(), ProcessSwitch()


def use_pytorch_ops() -> AbstractContextManager[None]:
    """Run the PyTorch implementation of every op inside the `with` block.

    The switch is process-wide: it affects all threads until the last such block ends.
    `torch.export`, `torch.onnx.export` and `torch.jit.trace` need no switch: they get these
    implementations.
    """
    return _DECOMPOSED.on()


def export_custom_ops() -> AbstractContextManager[None]:
    """Let `torch.export` and `torch.jit.trace` capture the ops `elip::*` inside the `with` block.

    Without it, a captured graph contains ATen ops only, and loads where torch alone is installed.
    With it, the loaded graph launches the kernels on a GPU, and a process must
    `import elip_kernels` before it loads the file. The switch is process-wide::

        with torch.no_grad(), elip_kernels.export_custom_ops():
            program = torch.export.export(model, (images,))
        torch.export.save(program, "model.pt2")
    """
    return _EXPORTED.on()


def is_captured() -> bool:
    """Return whether torch.export, torch.onnx.export or torch.jit.trace captures this call."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def exports_onnx() -> bool:
    """Return whether `torch.onnx.export` is running, which translates aten ops only."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _has_fixed_sizes(args: Iterable[Any]) -> bool:
    """Return whether all sizes but the first of each tensor are known when the graph is traced.

    The configuration of a kernel depends on them, but not on the batch size.
    """
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    sizes = [size for tensor in tensors for size in tensor.shape[1:]]
    return not any(isinstance(size, torch.SymInt) for size in (*args, *sizes))


class Operator:
    """The operator `torch.ops.elip.NAME` as a callable.

    Args:
        name: name of the op, without the namespace.
        reference: PyTorch implementation for every device. Its annotations define the schema.
        launcher: implementation with kernels; takes the same arguments, of a batch that is not
            empty, whose device is the current one.
        unsupported: returns the reason why the kernels do not support the arguments, or None. The
            PyTorch implementation supports all arguments.
        fake: returns outputs of the right shapes and dtypes, with undefined values.
        flops: FLOP formula; takes the shapes of the tensors.
        backward: as in `torch.library.register_autograd`; if None, outputs have no gradient.
        save: the `setup_context` of `torch.library.register_autograd`.
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
        self.unsupported, self.fake = unsupported, fake
        self.has_gradient = backward is not None
        self.warned_reasons: set[str] = set()
        signature = inspect.signature(reference)
        names = signature.parameters
        self.is_weight = [name.endswith(("_weight", "_bias")) for name in names]  # not of images
        self.decomposition = without_autocast(reference)

        def run(*args: Any) -> Any:
            return self._run(*args)

        run.__signature__ = signature
        run.__wrapped__ = self  # has no source: triton_op would import Inductor (2 s) to read it
        opaque = torch.library.custom_op(
            f"elip::{name}_opaque",
            self._run_opaque,
            mutates_args=(),
            schema=torch.library.infer_schema(reference, mutates_args=()),
        )
        opaque.register_fake(fake)
        is_traceable = HAS_TRITON and not is_interpreted()
        define = torch.library.triton_op if is_traceable else torch.library.custom_op
        self.op = op = define(f"elip::{name}", run, mutates_args=())
        op.register_kernel("cpu", self.decomposition)
        op.register_fake(fake)
        if backward is None:
            backward, save = _no_gradient(reference), _mark_outputs
        op.register_autograd(backward, setup_context=save)
        op.register_vmap(self._of_samples)
        packets = [getattr(torch.ops.elip, each) for each in (name, f"{name}_opaque")]
        register_flop_formula(packets)(flops)
        self.overload, self.opaque = (packet.default for packet in packets)
        OPERATORS[name] = self

    def __call__(self, *args: Any) -> Any:
        is_exported = exports_onnx() or (is_captured() and not _EXPORTED.is_on)
        if _DECOMPOSED.is_on or is_exported or is_differentiated(*args):
            return self.decomposition(*args)
        return self.overload(*args)

    def _run(self, *args: Any) -> Any:
        """Launch the kernels, eagerly or into a graph, or call the opaque op."""
        if not self._has_kernels(args) or not _has_fixed_sizes(args) or self.unsupported(*args):
            return self.opaque(*args)
        try:
            return self.launch(*args)
        except OutOfResources as error:
            return self._run_reference(args, f"the device has too little for them: {error}")

    def _run_opaque(self, *args: Any) -> Any:
        """Launch the kernels; if they do not support the arguments, warn once and run PyTorch."""
        if not self._has_kernels(args):
            return self.decomposition(*args)
        reason = self.unsupported(*args)
        return self.overload(*args) if reason is None else self._run_reference(args, reason)

    def _has_kernels(self, args: tuple[Any, ...]) -> bool:
        return args[0].device.type in launch.DEVICES

    def _run_reference(self, args: tuple[Any, ...], reason: str) -> Any:
        """Run PyTorch on a device that has kernels; warn once for each reason."""
        if reason not in self.warned_reasons:
            self.warned_reasons.add(reason)
            message = f"elip::{self.name}: the first argument has shape {tuple(args[0].shape)}; "
            message += f"the PyTorch implementation ran instead of the kernels, because {reason}"
            warnings.warn(message, FallbackWarning, stacklevel=2)
        return self.decomposition(*args)

    def launch(self, *args: Any) -> Any:
        """Launch the kernels on the device of the first argument; none for an empty batch."""
        if args[0].numel() == 0:
            return self.fake(*args)
        with no_autocast(args[0]), launch.device_guard(args[0]):
            return self.launcher(*args)

    def _of_samples(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Call the op under `vmap`: once, on a batch of the images of all samples.

        If the weights of a layer are mapped too, as in an ensemble, call it for each sample.
        """
        count, arguments = info.batch_size, list(zip(args, in_dims, self.is_weight, strict=False))
        if any(is_weight and dim is not None for _, dim, is_weight in arguments):
            samples = (repeat(x, count) if d is None else x.unbind(d) for x, d, _ in arguments)
            calls = [_tensors(self(*sample)) for sample in zip(*samples, strict=True)]
            outputs = tuple(map(torch.stack, zip(*calls, strict=True)))
        else:
            batch: list[Any] = []
            sizes: tuple[int, ...] = ()
            for x, dim, is_weight in arguments:
                if torch.is_tensor(x) and not is_weight:
                    x = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
                    sizes = sizes or x.shape[:2]  # of the first; one text may be for all images
                    x = x.expand(*sizes, *x.shape[2:]).flatten(0, 1)
                batch.append(x)
            outputs = tuple(x.unflatten(0, sizes) for x in _tensors(self(*batch)))
        return (outputs[0], 0) if len(outputs) == 1 else (outputs, (0,) * len(outputs))


class FallbackWarning(UserWarning):
    """An op ran its PyTorch implementation on a device that has kernels."""


def _no_gradient(reference: Callable[..., Any]) -> Callable[..., Any]:
    count = len(inspect.signature(reference).parameters)
    return lambda ctx, *grads: (None,) * count


def _mark_outputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*_tensors(output))


def _tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """Return the outputs of an op, which may be a single tensor."""
    return (output,) if torch.is_tensor(output) else output
