"""The replaced forward of a block, and the forward passes of eager calls that it enters.

    ReducedBlock    the forward of block i: enter the pass, run the block, leave it
    EagerPasses     finds the `ForwardState` of the pass that runs in this thread, or runs again
    Passes          the forward passes of eager calls and of graphs, which all blocks share
    TrackCall       the hook that tells the passes where a call of the model begins and ends

`EagerPasses` and `GraphPass` (graph_pass.py) have one interface: a block calls `enter_block`, and a
method that returns whole grids `begin_dense_call` and `end_dense_call`. Both refer to the
`Reduction`, which knows nothing of them.
"""

import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from elip_models.call_context import (
    DenseCall,
    Guide,
    add,
    guide_of,
    is_dense_call,
    records_of,
    take,
)
from elip_models.engine._private import in_autograd_function
from elip_models.engine.forward_state import BlockStep, ForwardState
from elip_models.engine.graph_pass import GraphPass
from elip_models.engine.padding import BLOCK_MASKS, with_masks
from elip_models.engine.recomputation import (
    Label,
    LeaveBlock,
    fingerprint_of,
    is_in_checkpoint,
    pass_entered_by,
    recompute_at,
)
from elip_models.engine.reduction import Reduction
from elip_models.towers.base import original_method

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
REFUSED = (
    "checkpoint: expected use_reentrant=False on a reduced model, got a re-entrant one, whose "
    "recomputation cannot find its forward pass; pass use_reentrant=False. The forward of any "
    "autograd.Function that calls the model looks the same; call the model outside of it"
)


class EnteredBlock(NamedTuple):
    """A block that a forward pass has entered and not left.

    step: the result of entering it. forward: the pass.
    label: the label of the pass, where a checkpoint may run the block again.
    """

    step: BlockStep
    forward: ForwardState
    label: Label | None


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

    A pass belongs to the thread that runs it, and a checkpoint may run its blocks again.

    reduction: the settings, to which guidance and records belong.
    running: the pass and the calls that run in this thread.
    pending: by id, the passes that a checkpoint may run again from their first block.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.running = Running()
        self.pending: WeakValueDictionary[int, ForwardState] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        """Copy without any forward pass."""
        return EagerPasses, (self.reduction,)

    def begin_dense_call(self) -> None:
        """Begin a call in which every block takes and returns all tokens of block 0."""
        add(DenseCall(self.reduction))

    def end_dense_call(self) -> None:
        """End that call, and a forward pass that has not reached the last block."""
        take(DenseCall)
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
        if may_run_again():
            recompute_at(output, self.reduction, forward)

    def enter_block(
        self, i: int, tokens: Tensor, kwargs: dict[str, Any], mask: Tensor | None
    ) -> EnteredBlock:
        """Apply the strategy to the tokens (B, N, D) that enter block i, in their forward pass.

        `kwargs` and the mask of the keys are what the model passes to the block.
        """
        guide = guide_of(self.reduction)
        forward, label = self._forward_at(i, tokens, mask, guide), None
        if may_run_again():
            label = Label.of(forward, tokens)
            is_first = i == self.reduction.first and forward.fingerprint is None
            if is_first and label is not None and label.is_dropped:
                forward.fingerprint = fingerprint_of(tokens)
                self.pending[id(forward)] = forward
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
        if label is None:
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
        on_grid = is_dense_call(self.reduction)
        if _is_recomputed(guide):
            on_grid = on_grid or guide.recomputation.forward.on_grid
        elif text_cls is not None and not torch.is_grad_enabled() and in_autograd_function():
            raise RuntimeError(REFUSED)
        forward = ForwardState.begin(self.reduction, i, tokens, mask, text_cls, on_grid=on_grid)
        forward.guided_by = None if guide is None else guide.owner
        return forward


def _is_recomputed(guide: Guide | None) -> bool:
    return guide is not None and guide.recomputation is not None


def may_run_again() -> bool:
    """Return whether autograd saves tensors through hooks, as it does in a checkpoint.

    Elsewhere, no block runs again, and none pays for it. Hooks cannot be disabled where some are.
    """
    if not torch.is_grad_enabled():
        return False
    try:
        with disable_saved_tensors_hooks("a checkpoint has hooks"):
            return False
    except RuntimeError:
        return True


class Passes:
    """The forward passes of a reduced model, of eager calls and of graphs."""

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.eager = EagerPasses(reduction)
        self.graph = GraphPass(reduction)

    @property
    def present(self) -> EagerPasses | GraphPass:
        """Return the forward passes of the code that runs now."""
        return self.graph if torch.compiler.is_compiling() else self.eager


class TrackCall:
    """The pre-forward and forward hook of a model whose call a checkpoint may recompute."""

    def __init__(self, passes: Passes) -> None:
        self.eager = passes.eager

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        """Begin the call before the forward, and end it after (with `output`)."""
        if torch.compiler.is_compiling():
            return
        if output:
            self.eager.end_call(output[0])
        else:
            self.eager.begin_call()


class ReducedBlock:
    """The replacement of block i's forward.

    replaced: the forward that another library or the user had put on the block, or None.
    """

    def __init__(self, passes: Passes, i: int, replaced: Callable[..., Any] | None) -> None:
        self.passes = passes
        self.reduction = passes.reduction
        self.i = i
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run block i on tokens (B, N, D), its first argument, with the library's arguments."""
        if not args:
            args, kwargs = self._tokens_first(kwargs)
        reduction = self.reduction
        if len(args) > 1 and reduction.tower.is_rotary:  # which reads its rotations by name
            args, kwargs = args[:1], dict(zip(self._names[1:], args[1:], strict=False)) | kwargs
        if reduction.graph.has_own_mask:
            args, kwargs = with_masks(args, kwargs, None)
        if not torch.compiler.is_compiling():
            return self._run_eagerly(args, kwargs)
        if self.block._compiled_call_impl is not None:
            from elip_models.engine.eager_step import call_eagerly

            entered = call_eagerly(self._enter_for_graph, args, kwargs)
            tokens, others = self._run(entered.step, args, kwargs)
            leave = self.passes.eager.leave_block
            return self._output(call_eagerly(leave, self.i, entered, tokens), others)
        step = self.passes.graph.enter_block(self.i, *self._entering(args, kwargs))
        return self._output(*self._run(step, args, kwargs))

    def _run_eagerly(self, args: Args, kwargs: Kwargs) -> Any:
        """Run the block outside of a graph. An error in it ends the forward pass."""
        passes = self.passes.eager
        try:
            entered = passes.enter_block(self.i, *self._entering(args, kwargs))
            tokens, others = self._run(entered.step, args, kwargs)
            if entered.label is not None:
                tokens = passes.leave_block(self.i, entered, tokens)
            return self._output(tokens, others)
        except BaseException:
            passes.abandon()
            raise

    def _enter_for_graph(self, args: Args, kwargs: Kwargs) -> EnteredBlock:
        """Enter the block; return the result without `info`, which a graph cannot read."""
        passes = self.passes.eager
        try:
            entered = passes.enter_block(self.i, *self._entering(args, kwargs))
        except BaseException:
            passes.abandon()
            raise
        return entered._replace(step=entered.step._replace(info=None))

    def _run(self, step: BlockStep, args: Args, kwargs: Kwargs) -> tuple[Tensor, Args]:
        """Run the block, unless the step has; return its tokens, and what it returns beside."""
        tokens, others = step.tokens, ()
        if not step.replaced_block:
            if step.changes_mask and (kwargs or len(args) > 1):
                args, kwargs = with_masks(args, kwargs, step.mask)
            tokens = self._run_at(step.positions, tokens, args[1:], kwargs)
        if isinstance(tokens, tuple) and self.reduction.tower.returns_tuple:
            tokens, *others = tokens
        return tokens if step.slots is None else step.slots.unmerged(tokens), tuple(others)

    def _output(self, tokens: Tensor, others: Args) -> Any:
        """Return the block's output in the form of its library."""
        return (tokens, *others) if self.reduction.tower.returns_tuple else tokens

    def _run_at(self, positions: Tensor | None, tokens: Tensor, args: Args, kwargs: Kwargs) -> Any:
        """Run the block's own forward; or its sublayers, if it would read others' positions."""
        tower = self.reduction.tower
        if positions is not None and tower.reads_own_positions:
            return (
                tower.from_block_kwargs(self.i, kwargs)
                .with_positions(positions)
                .run_sublayers(self.i, tokens)
            )
        if positions is not None:
            kwargs = tower.block_kwargs_at(kwargs, positions)
        return original_method(self.block, "forward", self.replaced)(tokens, *args, **kwargs)

    def _tokens_first(self, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return tokens passed by keyword as a positional argument, and the other keywords."""
        name = self._names[0]
        if name not in kwargs:
            raise TypeError(f"{name}: expected the tokens (B, N, D) of block {self.i}, got none")
        return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}

    @property
    def _names(self) -> list[str]:
        """Return the names of the arguments of the block's forward, that of the tokens first."""
        return list(inspect.signature(type(self.block).forward).parameters)[1:]

    @property
    def block(self) -> nn.Module:
        """Return the block whose forward is replaced."""
        return self.reduction.tower.blocks[self.i]

    def _mask(self, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Return the mask of the keys in the call's arguments, or None."""
        masks = (*args[1:], *(kwargs.get(name) for name in BLOCK_MASKS))
        masks = [mask for mask in masks if mask is not None]
        if (masks and not self.reduction.tower.takes_padding) or kwargs.get("is_causal"):
            raise ValueError("attn_mask: expected none on a reduced model, whose tokens change")
        return masks[0] if masks else None

    def _entering(self, args: Args, kwargs: Kwargs) -> tuple[Tensor, Kwargs, Tensor | None]:
        """Check the call's arguments; return the tokens, the keywords and the mask of the keys."""
        refuse_fx(args[0])
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise ValueError(
                "dynamo: expected True in torch.onnx.export of a reduced model, whose ops the "
                "TorchScript exporter does not know, got False; pass dynamo=True"
            )
        return args[0], kwargs, self._mask(args, kwargs) if kwargs or len(args) > 1 else None


def refuse_fx(tensor: Any) -> None:
    """Raise if torch.fx traces the model with symbols in place of tensors."""
    if isinstance(tensor, torch.fx.Proxy):
        raise TypeError(
            "model: expected a model before reduce_ for torch.fx (symbolic_trace, torchvision's "
            "create_feature_extractor), whose symbols no reduction can follow, got a reduced one; "
            "unreduce_ it first, or use torch.export"
        )
