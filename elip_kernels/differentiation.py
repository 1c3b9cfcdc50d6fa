"""Whether a call is differentiated by a transform of `torch.func` or by forward-mode AD."""

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from elip_kernels._private import function_transforms


def is_differentiated(*values: Any) -> bool:
    """Return whether `torch.func.grad`, `jvp` or other forward-mode AD differentiates this call.

    They support aten ops only.

    Args:
        values: the arguments of the call, of which the tensors may have a tangent.
    """
    return "Grad" in function_transforms() or has_tangents(*values)


def has_tangents(*values: Any) -> bool:
    """Return whether `torch.func.jvp`, or other forward-mode AD of these tensors, is active."""
    transforms = function_transforms()
    if transforms:  # under `vmap` no tangent is readable
        return "Jvp" in transforms
    tensors = [value for value in values if isinstance(value, Tensor)]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
