"""`kernel`: a Triton kernel whose launches find their compiled code by a short key.

Triton makes a text of the arguments and options of each launch. Here the key is a tuple of what it
specialises on: types, alignments, divisibility by 16, constants, options and device. The first
launch with a key is Triton's own, which compiles; later ones call the launcher of the compiled
kernel. `benchmarks/bench_host.py` measures them. The key and the launcher's arguments depend on the
version of Triton, so a version that is not in `TESTED_VERSIONS` makes every launch by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elip_kernels._triton import HAS_TRITON, is_interpreted, triton

if HAS_TRITON:
    from triton import knobs
    from triton.runtime.jit import JITFunction
else:
    JITFunction = object

TESTED_VERSIONS = frozenset({"3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0"})
"""Versions of Triton with which tests/kernels/test_kernel.py passes."""
IS_TESTED = HAS_TRITON and triton.__version__.partition("+")[0] in TESTED_VERSIONS
MAX_32_BIT = 2**31 - 1
KINDS = frozenset({Tensor, torch.nn.Parameter, int, float, bool, type(None)})
IS_ROCM = torch.version.hip is not None
_is_captured = ContextVar("is_captured", default=False)


@contextmanager
def captured_launches() -> Iterator[None]:
    """Make each launch inside the block a node of the graph that PyTorch traces.

    A compiler of PyTorch then compiles the kernel and launches it without this package. It passes
    a float as fp64, so kernels begin with `tl.cast(.., tl.float32)`.
    """
    token = _is_captured.set(True)
    try:
        yield
    finally:
        _is_captured.reset(token)


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a kernel that is launched from Python; the options are those of `triton.jit`."""
    if function is None:
        return partial(kernel, **options)
    if not HAS_TRITON or is_interpreted():
        return triton.jit(function, **options)
    return Kernel(function, **options)


class Kernel(JITFunction):
    """A kernel of Triton with a table of its compiled forms.

    It is launched by Triton itself if the version of Triton was not tested, and while a hook or a
    tool of Triton observes launches. Global constants of the kernel must not change after its first
    launch, which Triton would check.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self.compiled: dict[tuple, tuple] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if _is_captured.get():
            return partial(self._capture, grid)
        return partial(self.run, grid=grid, warmup=False)

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Any:
        """Launch the kernel; `constants` are its constexpr arguments and options."""
        is_plain = IS_TESTED and KINDS.issuperset(map(type, args))
        if warmup or not is_plain or self.pre_run_hooks or _is_observed():
            return super().run(*args, grid=grid, warmup=warmup, **constants)
        active = triton.runtime.driver.active
        device = active.get_current_device()
        key = device, *_modes(), *constants, *constants.values(), *_kinds(args)
        compiled = self.compiled.get(key)
        if compiled is None:
            code = super().run(*args, grid=grid, warmup=warmup, **constants)
            if code is not None and self._is_complete(args, constants):
                rest = tuple(constants[name] for name in self.arg_names[len(args) :])
                self.compiled[key] = code, code.run, code.function, rest
            return code
        code, launch, function, rest = compiled
        x, y, z = (*grid, 1, 1)[:3]
        stream, no_hooks = active.get_current_stream(device), (None, None, None)
        launch(x, y, z, stream, function, code.packed_metadata, *no_hooks, *args, *rest)
        return code

    def _capture(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Add the launch to the graph, without the compiler's options that graphs do not take."""
        names = {"num_warps", "num_stages", *self.arg_names}
        constants = {name: value for name, value in constants.items() if name in names}
        torch.library.wrap_triton(self)[grid](*args, **constants)

    def _is_complete(self, args: tuple[Any, ...], constants: dict[str, Any]) -> bool:
        """Return whether `constants` are the parameters behind `args`, and all constexprs."""
        first, rest = self.params[: len(args)], self.params[len(args) :]
        return not any(parameter.is_constexpr for parameter in first) and all(
            parameter.is_constexpr and parameter.name in constants for parameter in rest
        )


def _kinds(args: tuple[Any, ...]) -> list[Any]:
    """Return what Triton specialises a kernel on, or something finer."""
    kinds: list[Any] = []
    add = kinds.append
    for value in args:
        if isinstance(value, Tensor):
            add(value.dtype)
            add(value.data_ptr() & 15)
            if IS_ROCM:
                add(value.untyped_storage().nbytes() <= MAX_32_BIT)
        elif type(value) is int:
            add((value == 1, value & 15 == 0, value.bit_length() >> 5))
        else:
            add(None if value is None else type(value))
    return kinds


def _modes() -> tuple[Any, ...]:
    """Return the settings of Triton that can change between launches, and change the code."""
    compilation = knobs.compilation  # its settings depend on the version of Triton
    return (
        knobs.runtime.debug,
        IS_ROCM and knobs.amd.use_buffer_ops,
        getattr(compilation, "instrumentation_mode", None),
        getattr(compilation, "fpsan_homomorphic_casts", None),
    )


def _is_observed() -> bool:
    """Return whether a tool is called at each launch, or changes how kernels are compiled."""
    runtime = knobs.runtime
    if getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return True
    return _has_calls(runtime.launch_enter_hook) or _has_calls(runtime.launch_exit_hook)


def _has_calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))
