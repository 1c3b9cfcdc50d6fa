"""Operators `torch.ops.elip.*`: PyTorch on every device, Triton kernels on CUDA and ROCm.

They are defined with `torch.library.Library`, which has less overhead per call than `custom_op`.
At small batch sizes this overhead is as large as the time of the kernel, so a call with plain
tensors, which nothing observes or transforms, runs the implementation without the dispatcher.
`torch.compile` gets the launches of the kernels in place of the op.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import repeat
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils.flop_counter import register_flop_formula

from elip_kernels import launch
from elip_kernels._kernel import captured_launches
from elip_kernels._switch import ProcessSwitch
from elip_kernels._triton import OutOfResources, is_interpreted
from elip_kernels.autocast import without_autocast
from elip_kernels.differentiation import is_differentiated

PLAIN = frozenset(
    {torch.Tensor, torch.nn.Parameter, int, float, bool, torch.dtype, type(None), str}
)
"""Types of the arguments of a call without the dispatcher."""
VMAP = torch._C._dispatch_key_parse("VmapMode")  # of batched gradients
LIBRARY = torch.library.Library("elip", "DEF")
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


def _is_eager(args: tuple[Any, ...]) -> bool:
    """Return whether no mode, transform, trace or profiler is to see this call.

    The arguments have a storage of their values; observers of PyTorch's C++ alone are not seen.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._dispatch_tls_is_dispatch_key_included(VMAP)
        and not torch._C._autograd._profiler_enabled()
        and not torch.autograd.profiler._is_profiler_enabled
        and torch._C._get_tracing_state() is None
        and PLAIN.issuperset(map(type, args))
        and not any(isinstance(value, torch.Tensor) and value.is_neg() for value in args)
    )


def _has_fixed_sizes(args: Iterable[Any]) -> bool:
    """Return whether all sizes but the first of each tensor are known when the graph is traced.

    The configuration of a kernel depends on them, but not on the batch size.
    """
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    sizes = [size for tensor in tensors for size in tensor.shape[1:]]
    return not any(isinstance(size, torch.SymInt) for size in (*args, *sizes))


def _keeps_ops() -> bool:
    """Return whether `torch.export` is running, whose programs contain ops, not their kernels."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return custom_triton_ops_decomposition_disabled()


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
        self.warned_reasons: set[str] = set()
        names = inspect.signature(reference).parameters
        self.is_weight = [name.endswith(("_weight", "_bias")) for name in names]  # not of images
        schema = torch.library.infer_schema(reference, mutates_args=())
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self.decomposition = without_autocast(reference)
        LIBRARY.impl(name, self.decomposition, "CompositeExplicitAutograd")
        self.implementations = {"cpu": self.decomposition, "cuda": without_autocast(self.on_device)}
        LIBRARY.impl(name, self.implementations["cuda"], "CUDA")
        torch.library.register_fake(f"elip::{name}", fake, lib=LIBRARY)
        self.function = None if backward is None else self._autograd_function(backward, save)
        if backward is None:
            backward, save = _no_gradient(reference), _mark_outputs
        torch.library.register_autograd(f"elip::{name}", backward, setup_context=save, lib=LIBRARY)
        torch.library.register_torch_dispatch(
            f"elip::{name}", FunctionalTensorMode, self._in_graph, lib=LIBRARY
        )
        torch.library.register_vmap(f"elip::{name}", self._of_samples, lib=LIBRARY)
        register_flop_formula(getattr(torch.ops.elip, name))(flops)
        self.overload = getattr(torch.ops.elip, name).default
        OPERATORS[name] = self

    def __call__(self, *args: Any) -> Any:
        if _DECOMPOSED.is_on or is_differentiated():
            return self.decomposition(*args)
        if torch.compiler.is_compiling() or not _is_eager(args):
            if exports_onnx() or (is_captured() and not _EXPORTED.is_on):
                return self.decomposition(*args)
            return self.overload(*args)
        implementation = self.implementations.get(args[0].device.type)
        if implementation is None:
            return self.overload(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return implementation(*args)
        if self.function is not None:
            return self.function.apply(*args)
        with torch.no_grad():
            return implementation(*args)

    def on_device(self, *args: Any) -> Any:
        """Launch the kernels; if they do not support the arguments, warn once and run PyTorch."""
        reason = self.unsupported(*args)
        if reason is None:
            try:
                return self.launch(*args)
            except OutOfResources as error:
                reason = f"the device has too little for them: {error}"
        if reason not in self.warned_reasons:
            self.warned_reasons.add(reason)
            message = f"elip::{self.name}: the first argument has shape {tuple(args[0].shape)}; "
            message += f"the PyTorch implementation ran instead of the kernels, because {reason}"
            warnings.warn(message, FallbackWarning, stacklevel=2)
        return self.reference(*args)

    def launch(self, *args: Any) -> Any:
        """Launch the kernels on the device of the first argument; none for an empty batch."""
        if args[0].numel() == 0:
            return self.fake(*args)
        with launch.device_guard(args[0]):
            return self.launcher(*args)

    def _in_graph(
        self,
        mode: FunctionalTensorMode,
        overload: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Trace the launches of the kernels into a graph, or the op if they are not known yet."""
        plain = {torch.Tensor, FakeTensor, FunctionalTensor}.issuperset(types)
        implementation = self.implementations.get(args[0].device.type)
        has_kernels = implementation not in (None, self.decomposition)
        is_known = plain and has_kernels and not is_interpreted() and _has_fixed_sizes(args)
        if not is_known or _keeps_ops() or self.unsupported(*args) is not None:
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode, captured_launches():
            return without_autocast(self.launch)(*args)

    def _of_samples(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Call the op under `vmap`: once, on a batch of the images of all samples.

        If the weights of a layer are mapped too, as in an ensemble, call it for each sample.
        """
        count, arguments = info.batch_size, list(zip(args, in_dims, self.is_weight, strict=False))
        if any(is_weight and dim is not None for _, dim, is_weight in arguments):
            samples = (repeat(x, count) if d is None else x.unbind(d) for x, d, _ in arguments)
            calls = [_tensors(self.overload(*sample)) for sample in zip(*samples, strict=True)]
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
            outputs = tuple(x.unflatten(0, sizes) for x in _tensors(self.overload(*batch)))
        return (outputs[0], 0) if len(outputs) == 1 else (outputs, (0,) * len(outputs))

    def _autograd_function(
        self, backward: Callable[..., Any], save: Callable[..., None]
    ) -> type[torch.autograd.Function]:
        """Return the function of autograd with the formulas that `register_autograd` takes."""

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.implementations[args[0].device.type](*args)
            save(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"elip_{self.name}_", (torch.autograd.Function,), methods)


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
