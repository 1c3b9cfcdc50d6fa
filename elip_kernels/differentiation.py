"""Which transform differentiates a call: function transforms and forward-mode AD of PyTorch."""

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad


def is_differentiated(
    transforms: tuple[TransformType, ...] = (TransformType.Grad, TransformType.Jvp),
) -> bool:
    """Return whether forward-mode AD, or one of these transforms, differentiates this call.

    `torch.func.grad`, `jvp` and forward-mode AD support aten ops only. Inside a compiled graph, the
    value is the one at the time of tracing.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return forward_ad._current_level >= 0
    stack = torch._C._functorch.get_interpreter_stack()
    return any(transform.key() in transforms for transform in stack)


def has_tangents() -> bool:
    """Return whether `torch.func.jvp` or other forward-mode AD differentiates this call."""
    return is_differentiated((TransformType.Jvp,))


# `torch.compiler.assume_constant_result` sets this too, but it imports torch._dynamo.
is_differentiated._dynamo_marked_constant = has_tangents._dynamo_marked_constant = True
