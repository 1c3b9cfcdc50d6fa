"""The two names of PyTorch in this package that its documentation lacks."""

import torch


def function_transforms() -> list[str]:
    """Return "Grad", "Jvp", "Vmap" or "Functionalize" for each active transform of `torch.func`.

    Inside a compiled graph, these are the transforms at the time of tracing.
    """
    # `register_autograd` does not support `torch.func.grad`, and no documented function says that
    # it is active
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return [transform.key().name for transform in stack]


# `torch.compiler.assume_constant_result` sets this, but it imports torch._dynamo, which takes 2 s
function_transforms._dynamo_marked_constant = True
