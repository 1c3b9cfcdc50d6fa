"""The forward pass in a graph that torch.compile or torch.export makes of a reduced model.

Its attributes are plain, so that the compiler can guard them. A graph cannot read the context
variable of `call_context.py`, so an op in the graph raises if another thread or task has set the
text.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from elip_models.call_context import Guide, items
from elip_models.engine._private import in_backward
from elip_models.engine.forward_state import BlockStep, ForwardState
from elip_models.engine.reduction import Reduction

_RUNNING = threading.local()
"""`text_cls`: the text that the graph running in this thread has encoded for itself."""


class GraphPass:
    """The forward pass in a graph of one reduced model.

    reduction: the settings, and the guidance that graphs read.
    forward, on_grid: the running forward pass, and whether blocks return whole grids.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.forward: ForwardState | None = None
        self.on_grid = False

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        """Copy without any forward pass."""
        return GraphPass, (self.reduction,)

    def begin_dense_call(self) -> None:
        """Begin a call in which every block takes and returns all tokens of block 0."""
        self.on_grid = True

    def end_dense_call(self) -> None:
        """End that call, and a forward pass that has not reached the last block."""
        self.on_grid, self.forward = False, None

    def enter_block(
        self, i: int, tokens: Tensor, kwargs: dict[str, Any], mask: Tensor | None
    ) -> BlockStep:
        """Apply the strategy to the tokens (B, N, D) that enter block i.

        Blocks that need no earlier result share no pass, so that each may be checkpointed.
        """
        reduction = self.reduction
        if not reduction.shares_forward and not self.on_grid:
            if i not in reduction.acts_at:
                return BlockStep(tokens)
            return self._begin(i, tokens, mask).enter_block(i, tokens, kwargs)
        if self.forward is None or i == reduction.first:
            self.forward = self._begin(i, tokens, mask)
        forward = self.forward
        if i == reduction.last:
            self.forward = None
        return forward.store(i, forward.enter_block(i, tokens, kwargs))

    def _begin(self, i: int, tokens: Tensor, mask: Tensor | None) -> ForwardState:
        guidance = self.reduction.graph
        text_cls = guidance.text_cls if guidance.own_text is None else guidance.own_text
        if text_cls is not None and not torch.compiler.is_exporting():
            text_cls = own_guidance(text_cls)
        return ForwardState.begin(self.reduction, i, tokens, mask, text_cls, on_grid=self.on_grid)


def _op(name: str) -> Any:
    tags = (torch.Tag.cudagraph_unsafe,)  # a replay of kernels alone would skip the check
    return torch.library.custom_op(f"elip::{name}", mutates_args=(), tags=tags)


@_op("own_guidance")
def own_guidance(text_cls: Tensor) -> Tensor:
    """Return a copy of the guidance (B, D) that a graph reads.

    Raises:
        RuntimeError: another thread or task has set it.
    """
    mine = [guide.text_cls for guide in items(Guide)] + [getattr(_RUNNING, "text_cls", None)]
    is_mine = any(t is not None and t.data_ptr() == text_cls.data_ptr() for t in mine)
    if not is_mine and not in_backward():  # the forward has checked
        raise RuntimeError(
            "guidance: expected a compiled model to be guided by one thread or task at a time, got "
            "a call while another guides it; give each its own copy.deepcopy(model), compiled"
        )
    return text_cls.clone()


@_op("set_guidance")
def set_guidance(text_cls: Tensor) -> Tensor:
    """Return a copy of text_cls (B, D), the guidance of the graph that runs in this thread."""
    _RUNNING.text_cls = text_cls.clone()
    return _RUNNING.text_cls


@own_guidance.register_fake
@set_guidance.register_fake
def _(text_cls: Tensor) -> Tensor:
    return torch.empty_like(text_cls)
