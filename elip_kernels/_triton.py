"""`triton` and `tl`, or a placeholder that keeps the kernel files importable without Triton.

Without Triton no kernel is launched: `launch.unsupported` reads `HAS_TRITON`, and the ops run their
PyTorch implementation.
"""

from importlib.util import find_spec
from typing import Any

import torch

HAS_TRITON = find_spec("triton") is not None


class _MissingTriton:
    """Placeholder for `triton` and `tl`: every attribute is a decorator that changes nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda first=None, *args, **kwargs: first or (lambda function: function)


if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton import OutOfResources
else:
    triton = tl = _MissingTriton()

    class OutOfResources(Exception):
        """A kernel needs more of a resource than the device has; never raised without Triton."""


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return HAS_TRITON and triton.knobs.runtime.interpret


def wrap_triton(kernel: Any) -> Any:
    """Return `kernel` in the form that PyTorch traces; the interpreter's kernels as they are."""
    return kernel if is_interpreted() else torch.library.wrap_triton(kernel)


__all__ = ["HAS_TRITON", "OutOfResources", "is_interpreted", "tl", "triton", "wrap_triton"]
