"""`example_of`: arguments of a public op as models use it, for the checks of all ops.

An example is the last part of the file of its op. Its arguments are for a batch of B images of N
tokens of width D, of which K are kept, with H heads: random tensors on the CPU. Of more than four
images each is equal to the fourth before it, because random numbers take time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIFFERENT_IMAGES = 4
Arguments = dict[str, Any]
"""Arguments by name; the first is the tensor that a gradient reaches, if the op has one."""


class Sizes(NamedTuple):
    """Sizes and dtype of the arguments of an example."""

    B: int
    N: int
    D: int
    K: int
    H: int
    dtype: torch.dtype

    def images(self, *shape: int) -> Tensor:
        """Return a tensor (B, *shape) from N(0, 1)."""
        different = torch.randn(min(self.B, DIFFERENT_IMAGES), *shape).to(self.dtype)
        return different[torch.arange(self.B) % DIFFERENT_IMAGES]

    def tokens(self) -> Tensor:
        """Return tokens (B, N, D) from N(0, 1)."""
        return self.images(self.N, self.D)

    def token_counts(self) -> Tensor:
        """Return how many tokens each of B x N tokens contains: (B, N) fp32, 1 to 5."""
        return torch.randint(1, 6, (self.B, self.N)).float()

    def block(self) -> Arguments:
        """Return tokens, CLS, and norm, query and key parameters of a pre-norm block."""
        vectors, matrices = torch.randn(3, self.D), torch.randn(2, self.D, self.D) / self.D**0.5
        parameters = {"norm_weight": vectors[0], "norm_bias": vectors[1], "q_weight": matrices[0]}
        parameters |= {"q_bias": vectors[2], "k_weight": matrices[1]}
        inputs = {"tokens": self.tokens(), "cls": torch.randn(self.B, self.D)}
        tensors = {name: tensor.to(self.dtype) for name, tensor in (inputs | parameters).items()}
        return tensors | {"eps": 1e-6, "num_heads": self.H}


class Example(NamedTuple):
    """A public op and how to make arguments for it.

    Attributes:
        function: the public function.
        arguments: returns arguments of a call for given sizes.
        has_kernels: whether a call launches kernels on a GPU.
    """

    function: Callable[..., Any]
    arguments: Callable[[Sizes], Arguments]
    has_kernels: bool

    def outputs(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """Call the op; return the tensors of its result, and last the gradient if there is one."""
        (first, leaf), *_ = arguments.items()
        leaf = leaf.detach().requires_grad_()
        outputs = tensors_of(self.function(**arguments | {first: leaf}))
        if outputs[0].requires_grad:
            # exact in every dtype; the last image has the same in every batch
            upstream = torch.arange(-outputs[0].numel(), 0, device=leaf.device) % 7 - 3.0
            upstream = upstream.to(leaf.dtype).view_as(outputs[0])
            outputs += torch.autograd.grad(outputs[0], leaf, upstream)
        return tuple(output.detach() for output in outputs)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a result: a tensor, or a tuple of tensors and infos."""
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return [value] if isinstance(value, Tensor) else []


def map_tensors(change: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    """Return the arguments with each tensor changed, those of infos included."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(changed, value))
        return change(value) if isinstance(value, Tensor) else value

    return {name: changed(value) for name, value in arguments.items()}


EXAMPLES: dict[str, Example] = {}
"""The example of every public op by the name of the op."""


def example_of(
    function: Callable[..., Any], *, has_kernels: bool = True
) -> Callable[[Callable[[Sizes], Arguments]], Callable[[Sizes], Arguments]]:
    """Add the decorated function to `EXAMPLES` as the arguments of a public op."""

    def add(arguments: Callable[[Sizes], Arguments]) -> Callable[[Sizes], Arguments]:
        EXAMPLES[function.__name__] = Example(function, arguments, has_kernels)
        return arguments

    return add
