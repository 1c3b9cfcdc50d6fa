"""How a block that activation checkpointing runs again finds its forward pass.

A checkpoint drops the tensors that are saved for backward in it, and runs its function again when
backward reads one of them. Both are seen through autograd's public interface:

    enter a block   Save a `Label` that names the pass. If it is dropped, the block may run again.
    leave it        `LeaveBlock` keeps the pass as long as the graph. Its backward comes before that
                    of the block, and reads the label: the checkpoint runs again inside that read,
                    under `recomputing`, which provides the pass and its guidance.
    leave a model   The gradient of its output does the same, for a checkpoint of the whole model.

A checkpoint may hold several passes. `pass_entered_by` finds each by the tokens and the text that
enter its first block again; the label that is read decides between equal ones. The identity of a
tensor would not do: two passes may read the same images under two texts, and a tensor that is made
in the checkpoint (a cast, a nested checkpoint, an offloaded one) is another one when it runs again.

If backward reaches a checkpoint through operations that follow the model in it, the blocks run as
in a new call. In any case, the label that they save names their pass: `_check` compares it with the
pass whose label is read.
"""

import math
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import debug_unwrap
from torch.utils.checkpoint import CheckpointError

from elip_models.call_context import Guide, Recomputation, within
from elip_models.engine.forward_state import ForwardState
from elip_models.engine.reduction import Reduction

CHANGED = (
    "guidance: expected the text, the strategy and the random numbers of the forward pass where "
    "activation checkpointing runs it again, got others; call reduce_ before the forward. If the "
    "checkpoint goes on after the model, enter guidance(model, ..) inside of the checkpointed "
    "function, or checkpoint the model or its blocks alone. If it holds two calls on the same "
    "images, checkpoint each by itself"
)


class Label:
    """A tensor saved for backward that names the forward pass which saved it.

    is_dropped: a checkpoint has not kept the tensor, and may run the call again.
    output: a tensor whose graph node holds it.
    """

    def __init__(self, forward: ForwardState | None, *, has_gradient: bool = False) -> None:
        name = _ANCHOR.clone() if has_gradient else torch.empty(0, device="cpu")
        name.forward_state = forward
        kept = weakref.ref(name)
        self.output = _Save.apply(name, _ANCHOR)
        del name
        self.is_dropped = kept() is None

    @classmethod
    def of(cls, forward: ForwardState | None, tokens: Tensor) -> "Label | None":
        """Return a label, unless torch.func transforms the code that computes with `tokens`."""
        return cls(forward) if debug_unwrap(tokens) is tokens else None


with torch.inference_mode(False):
    _ANCHOR = torch.zeros((), device="cpu", requires_grad=True)  # so that autograd saves a label


class _Save(Function):
    """Save a tensor for backward, which passes no gradient."""

    @staticmethod
    def forward(ctx: Any, name: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(name)
        return name.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class LeaveBlock(Function):
    """The identity on the tokens (B, N, D) that leave a block in a checkpoint."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, label: Tensor, reduction: Reduction, forward: ForwardState
    ) -> Tensor:
        """Return the tokens; keep the pass, and the node that saved the label."""
        ctx.saved_by = reduction, forward, label.grad_fn
        return tokens.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient, after the block has run again."""
        recompute(*ctx.saved_by)
        return gradient, None, None, None


def is_in_checkpoint() -> bool:
    """Return whether a checkpoint runs this code, for the first time or again.

    The second run keeps labels, but a detached copy of one with a gradient.
    """
    return Label(None, has_gradient=True).is_dropped


def recompute_at(output: Any, reduction: Reduction, forward: ForwardState | None) -> None:
    """Recompute a model's call when backward reaches a tensor of its output.

    Every such tensor in a checkpoint saves a label: a recomputation must save as many tensors as
    its forward.
    """
    if isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            recompute_at(value, reduction, forward)
    elif isinstance(output, Tensor) and output.requires_grad:
        label = Label.of(forward, output)
        if label is not None and label.is_dropped and forward is not None:
            node = label.output.grad_fn
            output.register_hook(lambda gradient: recompute(reduction, forward, node))


def recompute(reduction: Reduction, forward: ForwardState, node: Any) -> None:
    """Read the label that `node` saved: a checkpoint around it runs its function again.

    Raises:
        RuntimeError: the function has selected other tokens, or the model's strategy has changed.
    """
    try:
        with recomputing(reduction, forward):
            (name,) = node.saved_tensors
    except CheckpointError as error:
        if reduction.is_installed:
            raise
        raise RuntimeError(CHANGED) from error
    _check(forward, getattr(name, "forward_state", None))


def recomputing(reduction: object, forward: ForwardState) -> AbstractContextManager[None]:
    """Guide the calls inside, in this thread, as the pass that they recompute was guided."""
    recomputation = Recomputation(forward)
    return within(Guide(reduction, forward.text_cls, recomputation, recomputation))


def pass_entered_by(
    tokens: Tensor, text_cls: Tensor | None, passes: Iterable[ForwardState]
) -> ForwardState:
    """Return the pass whose first block these tokens (B, N, D) entered, under this text.

    It is the nearest if the recomputation differs by rounding; the first of equally near ones.
    """
    entering = fingerprint_of(tokens)

    def distance(forward: ForwardState) -> float:
        text = _distance(forward.text_cls, text_cls)
        return _distance(forward.fingerprint, entering) + text

    first, *others = passes
    return first if distance(first) == 0 else min((first, *others), key=distance)


def fingerprint_of(tokens: Tensor) -> Tensor:
    """Return the sum (B, D) of tokens (B, N, D), by which a recomputation finds their pass."""
    return tokens.detach().sum(1, dtype=torch.float32)


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    if one is other:
        return 0.0
    if one is None or other is None or one.shape != other.shape:
        return math.inf
    return (one - other).abs().sum().item()


def _check(forward: ForwardState, again: ForwardState | None) -> None:
    """Raise RuntimeError if the pass that ran again has selected other tokens."""
    if again is None or again is forward or again.repeats is forward:
        return
    for i, info in forward.infos.items():
        repeated = again.infos.get(i)
        if repeated is not None and not _same(info.reduction, repeated.reduction):
            raise RuntimeError(CHANGED)
    again.repeats = forward


def _same(one: Any, other: Any) -> bool:
    """Return whether two results select the same tokens, with the same weights."""
    if type(one) is not type(other):
        return False
    for name in ("kept", "slots"):
        a, b = getattr(one, name, None), getattr(other, name, None)
        if a is not None and not torch.equal(a, b):
            return False
    weights = getattr(one, "weights", None)
    return weights is None or torch.allclose(weights, other.weights)
