"""`triton` and `tl`, or a stand-in that leaves the kernel files importable where triton is absent.

Without triton no kernel is ever launched: the launchers ask `HAS_TRITON` and take the PyTorch form.
"""

from importlib.util import find_spec
from typing import Any

HAS_TRITON = find_spec("triton") is not None


class _MissingTriton:
    """Answers every attribute with a function that hands a function back, as a decorator does."""

    def __getattr__(self, name: str) -> Any:
        return lambda first=None, *args, **kwargs: first or (lambda function: function)


if HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = tl = _MissingTriton()


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return HAS_TRITON and triton.knobs.runtime.interpret


__all__ = ["HAS_TRITON", "is_interpreted", "tl", "triton"]
