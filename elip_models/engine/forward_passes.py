"""The forward passes of a reduced model: of eager calls, and of the graph that torch.compile makes.

Both classes have one interface: a block calls `enter_block`, and a method that returns whole grids
`begin_dense_call` and `end_dense_call`. Eager passes belong to the thread that runs them, and a
checkpoint may run their blocks again. The attributes of a graph's pass are plain, so that the
compiler can guard them.
"""

import threading
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from elip_models.engine import call_context
from elip_models.engine.call_context import DENSE_CALLS, Guide, guide_of, records_of
from elip_models.engine.forward_state import BlockStep, ForwardState
from elip_models.engine.recomputation import (
    REFUSED,
    Label,
    LeaveBlock,
    can_recompute,
    in_autograd_function,
    is_in_checkpoint,
    pass_entered_by,
    recompute_at,
    sum_of,
)


class EnteredBlock(NamedTuple):
    """A block that a forward pass has entered and not left.

    step: the result of entering it.
    forward, label: in an eager pass, its state, and its label if gradients are recorded.
    """

    step: BlockStep
    forward: ForwardState | None = None
    label: Label | None = None


class Running(threading.local):
    """What runs in one thread.

    forward: the pass that runs its blocks, or None.
    calls: the running calls of the model, innermost last; the pass of each, if any.
    """

    def __init__(self) -> None:
        self.forward: ForwardState | None = None
        self.calls: list[ForwardState | None] = []


class EagerPasses:
    """The forward passes of eager calls of one reduced model.

    reduction: the reduction, to which guidance and records belong.
    running: the pass and the calls that run in this thread.
    pending: by id, the passes that a checkpoint may run again from their first block.
    """

    def __init__(self, reduction: Any) -> None:
        self.reduction = reduction
        self.running = Running()
        self.pending: WeakValueDictionary[int, ForwardState] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        """Copy without any forward pass."""
        return EagerPasses, (self.reduction,)

    def begin_dense_call(self) -> None:
        """Begin a call in which every block takes and returns all tokens of block 0."""
        DENSE_CALLS.set((*DENSE_CALLS.get(), self.reduction))

    def end_dense_call(self) -> None:
        """End that call, and a forward pass that has not reached the last block."""
        DENSE_CALLS.set(DENSE_CALLS.get()[:-1])
        self.running.forward = None

    def begin_call(self) -> None:
        """Begin a call of the model, or of the image model in it."""
        self.running.calls.append(None)

    def end_call(self, output: Any) -> None:
        """End that call, and a forward pass that it leaves unfinished."""
        calls, guide = self.running.calls, guide_of(self.reduction)
        if not calls:  # a graph has begun the call
            return
        forward = calls.pop()
        if not calls:
            self.running.forward = None
        if _is_recomputed(guide):
            guide.recomputation.other = None
        recompute_at(output, self.reduction, forward)

    def enter_block(
        self, i: int, tokens: Tensor, kwargs: dict[str, Any], mask: Tensor | None
    ) -> EnteredBlock:
        """Apply the strategy to the tokens (B, N, D) that enter block i, in their forward pass.

        `kwargs` and the mask of the keys are what the model passes to the block.
        """
        guide = guide_of(self.reduction)
        forward, label = self._forward_at(i, tokens, mask, guide), None
        if can_recompute(tokens):
            label = Label(forward)
            if i == self.reduction.first and label.is_dropped and forward.entering is None:
                forward.entering, self.pending[id(forward)] = sum_of(tokens), forward
        elif tokens.requires_grad and in_autograd_function():
            raise RuntimeError(REFUSED)
        step = forward.enter_block(i, tokens, kwargs)
        if step.info is not None and i not in forward.infos and not _is_recomputed(guide):
            for infos in records_of(self.reduction):
                infos.append(step.info)
        return EnteredBlock(forward.store(i, step), forward, label)

    def leave_block(self, i: int, entered: EnteredBlock, tokens: Tensor) -> Tensor:
        """Return the tokens that leave block i, which a checkpoint may recompute."""
        forward, label = entered.forward, entered.label
        if label is None:  # of a compiled block without gradient
            return tokens
        is_dropped, is_last = label.is_dropped, i == self.reduction.last
        if not tokens.requires_grad:  # a frozen tower: its output alone keeps the pass
            is_dropped = is_last and is_in_checkpoint()
        if not is_dropped:
            return tokens
        return LeaveBlock.apply(tokens, label.output, self.reduction, forward)

    def abandon(self) -> None:
        """End the forward pass of this thread, of which a block has raised an error."""
        if not _is_recomputed(guide_of(self.reduction)):
            self.running.forward = None

    def _forward_at(
        self, i: int, tokens: Tensor, mask: Tensor | None, guide: Guide | None
    ) -> ForwardState:
        """Return the forward pass whose tokens enter block i; begin it at the first block."""
        running, reduction = self.running, self.reduction
        recomputation = None if guide is None else guide.recomputation
        if recomputation is not None and torch.is_grad_enabled():
            if i == reduction.first and len(self.pending) > 1:
                pending = [ref() for ref in self.pending.valuerefs()]
                passes = (recomputation.forward, *filter(None, pending))
                recomputation.other = pass_entered_by(tokens, guide.text_cls, passes)
            forward = recomputation.other or recomputation.forward
        else:
            forward = running.forward
            if forward is None or i == reduction.first:
                forward = running.forward = self._begin(i, tokens, mask, guide)
            if i == reduction.last:
                running.forward = None
        if i == reduction.last and running.calls:
            running.calls[:] = [forward] * len(running.calls)
        return forward

    def _begin(
        self, i: int, tokens: Tensor, mask: Tensor | None, guide: Guide | None
    ) -> ForwardState:
        text_cls = None if guide is None else guide.text_cls
        on_grid = any(reduction is self.reduction for reduction in DENSE_CALLS.get())
        if _is_recomputed(guide):
            on_grid = on_grid or guide.recomputation.forward.on_grid
        elif text_cls is not None and not torch.is_grad_enabled() and in_autograd_function():
            raise RuntimeError(REFUSED)
        forward = self.reduction.begin_forward(i, tokens, mask, text_cls, on_grid=on_grid)
        forward.guided_by = None if guide is None else guide.owner
        return forward


class GraphPass:
    """The forward pass in a graph of one reduced model.

    reduction: the reduction, to which the guidance belongs.
    guides, text_cls: the texts by the id of their owner, and the most recent text; a thread
        changes them, and the next two, under `lock`.
    pairings, is_paired: the owners of `guidance(model, paired=True)`, and whether there is one.
    own_text: the text that the whole model's forward has encoded.
    forward, on_grid: the running forward pass, and whether blocks return whole grids.
    has_own_mask: in torch.export, the model makes a mask that hides no token, see `with_masks`.
    """

    def __init__(self, reduction: Any) -> None:
        self.reduction = reduction
        self.lock = threading.Lock()
        self.guides: dict[int, Tensor] = {}
        self.text_cls: Tensor | None = None
        self.pairings: set[int] = set()
        self.is_paired = False
        self.own_text: Tensor | None = None
        self.forward: ForwardState | None = None
        self.on_grid = False
        self.has_own_mask = False

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        """Copy without guidance and without a forward pass."""
        return GraphPass, (self.reduction,)

    def begin_dense_call(self) -> None:
        """Begin a call in which every block takes and returns all tokens of block 0."""
        self.on_grid = True

    def end_dense_call(self) -> None:
        """End that call, and a forward pass that has not reached the last block."""
        self.on_grid, self.forward = False, None

    def enter_block(
        self, i: int, tokens: Tensor, kwargs: dict[str, Any], mask: Tensor | None
    ) -> EnteredBlock:
        """Apply the strategy to the tokens (B, N, D) that enter block i.

        Blocks that need no earlier result share no pass, so that each may be checkpointed.
        """
        reduction = self.reduction
        if not reduction.shares_forward and not self.on_grid:
            if i not in reduction.acts_at:
                return EnteredBlock(BlockStep(tokens))
            return EnteredBlock(self._begin(i, tokens, mask).enter_block(i, tokens, kwargs))
        if self.forward is None or i == reduction.first:
            self.forward = self._begin(i, tokens, mask)
        forward = self.forward
        if i == reduction.last:
            self.forward = None
        return EnteredBlock(forward.store(i, forward.enter_block(i, tokens, kwargs)))

    def _begin(self, i: int, tokens: Tensor, mask: Tensor | None) -> ForwardState:
        text_cls = self.text_cls if self.own_text is None else self.own_text
        if text_cls is not None and not torch.compiler.is_exporting():
            text_cls = call_context.own_guidance(text_cls)
        return self.reduction.begin_forward(i, tokens, mask, text_cls, on_grid=self.on_grid)


class TrackCall:
    """The pre-forward and forward hook of a model whose call a checkpoint may recompute."""

    def __init__(self, reduction: Any) -> None:
        self.reduction = reduction

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        """Begin the call before the forward, and end it after (with `output`)."""
        if torch.compiler.is_compiling():
            return
        if output:
            self.reduction.eager.end_call(output[0])
        else:
            self.reduction.eager.begin_call()


def _is_recomputed(guide: Guide | None) -> bool:
    return guide is not None and guide.recomputation is not None
