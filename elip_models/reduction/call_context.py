"""The context of a call of a reduced model: its guidance, its records, and its recomputation.

Guidance, records and dense calls belong to the thread or task that sets them: context variables
store them. A compiled graph cannot read a context variable, so a `Reduction` has attributes for
graphs, and an op in the graph raises if another thread or task has set the text.

Activation checkpointing runs a block again during backward. Guidance may have ended by then, and
scoring would cost a second dry run, so the block repeats the steps of its own forward pass. That
pass is found in one of two ways:

    non-re-entrant  The checkpoint's frame is the same object in forward and recomputation, and
                    lives as long as the graph: the passes that ran in it are stored by frame.
    re-entrant      The forward runs without gradient and leaves no trace in the graph. Autograd
                    numbers its nodes in the order of the forward, and created the checkpoint's node
                    before them: the right pass is the first with a higher number. A bounded number
                    of passes is stored.
"""

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elip_models.reduction.step import ForwardState
from elip_models.reduction.strategy import StageInfo

MAX_REENTRANT = 64  # stored re-entrant passes of a block that wait for their backward
CHECKPOINT_MODULE = inspect.unwrap(checkpoint).__module__

Pack = Callable[..., Any]


class Guide(NamedTuple):
    """A text (B, D), or None, that guides a reduction until `owner` removes it."""

    reduction: object
    text_cls: Tensor | None
    owner: object


class Record(NamedTuple):
    """A list that receives each `StageInfo` of these reductions."""

    reductions: Sequence[object]
    infos: list[StageInfo]


GUIDES: ContextVar[tuple[Guide, ...]] = ContextVar("GUIDES", default=())
RECORDS: ContextVar[tuple[Record, ...]] = ContextVar("RECORDS", default=())
DENSE_CALLS: ContextVar[tuple[object, ...]] = ContextVar("DENSE_CALLS", default=())
"""The reductions whose models run a method that returns the tokens of several blocks."""
_GRAPH = threading.local()
"""`text_cls`: the text that the graph running in this thread has encoded for itself."""


def set_guide(reduction: object, text_cls: Tensor | None, owner: object) -> None:
    """Guide the forward passes of this thread or task until `owner` removes the text."""
    GUIDES.set((*GUIDES.get(), Guide(reduction, text_cls, owner)))


def drop_guide(owner: object) -> None:
    """Remove the texts that `owner` has set, whatever was set after them."""
    GUIDES.set(tuple(guide for guide in GUIDES.get() if guide.owner is not owner))


def guide_of(reduction: object) -> Guide | None:
    """Return the most recent guide of the reduction in this thread or task, or None."""
    guides = (guide for guide in reversed(GUIDES.get()) if guide.reduction is reduction)
    return next(guides, None)


def _op(name: str) -> Any:
    tags = (torch.Tag.cudagraph_unsafe,)  # a replay of kernels alone would skip the check
    return torch.library.custom_op(f"elip::{name}", mutates_args=(), tags=tags)


@_op("own_guidance")
def own_guidance(text_cls: Tensor) -> Tensor:
    """Return a copy of the guidance (B, D) that a graph reads.

    Raises:
        RuntimeError: another thread or task has set it.
    """
    mine = [guide.text_cls for guide in GUIDES.get()] + [getattr(_GRAPH, "text_cls", None)]
    is_mine = any(t is not None and t.data_ptr() == text_cls.data_ptr() for t in mine)
    if not is_mine and not _in_backward():  # the forward pass has checked
        raise RuntimeError(
            "guidance: expected a compiled model to be guided by one thread or task at a time, got "
            "a call while another guides it; give each its own copy.deepcopy(model), compiled"
        )
    return text_cls.clone()


@_op("set_guidance")
def set_guidance(text_cls: Tensor) -> Tensor:
    """Return a copy of text_cls (B, D), the guidance of the graph that runs in this thread."""
    _GRAPH.text_cls = text_cls.clone()
    return _GRAPH.text_cls


@own_guidance.register_fake
@set_guidance.register_fake
def _(text_cls: Tensor) -> Tensor:
    return torch.empty_like(text_cls)


@contextmanager
def recording(reductions: Sequence[object], infos: list[StageInfo]) -> Iterator[None]:
    """Append the result of each step of the reductions in this thread or task to `infos`."""
    this = Record(reductions, infos)
    RECORDS.set((*RECORDS.get(), this))
    try:
        yield
    finally:
        RECORDS.set(tuple(each for each in RECORDS.get() if each is not this))


def records_of(reduction: object) -> list[list[StageInfo]]:
    """Return the lists that record the reduction in this thread or task."""
    return [r.infos for r in RECORDS.get() if any(reduction is each for each in r.reductions)]


@dataclass
class Region:
    """The forward passes of each block in one checkpoint, in the order of their calls.

    recomputation: the recomputation that runs now. done: its calls of each block so far.
    """

    forwards: dict[int, list[ForwardState]] = field(default_factory=dict)
    recomputation: object = None
    done: dict[int, int] = field(default_factory=dict)

    def add(self, i: int, forward: ForwardState) -> None:
        """Add a call of block i."""
        self.forwards.setdefault(i, []).append(forward)

    def next(self, i: int, recomputation: object) -> ForwardState:
        """Return the forward pass of the next call of block i in this recomputation."""
        if self.recomputation != recomputation:
            self.recomputation, self.done = recomputation, {}
        self.done[i] = self.done.get(i, 0) + 1
        return self.forwards[i][self.done[i] - 1]


class NumberedRegion(NamedTuple):
    """A region that ran without gradient, with autograd's sequence number in its thread."""

    number: int
    thread: int
    region: Region


class Replay:
    """The forward passes of one reduced model that a checkpoint may recompute."""

    def __init__(self) -> None:
        self.regions: WeakKeyDictionary[Any, Region] = WeakKeyDictionary()
        self.reentrant: dict[int, deque[NumberedRegion]] = {}
        self.forgotten: dict[int, int] = {}  # the highest removed number of each block

    def __reduce__(self) -> tuple[type, tuple]:
        """Copy without any forward pass."""
        return Replay, ()

    def remember(self, i: int, forward: ForwardState) -> None:
        """Store that `forward` enters block i in the checkpoints that are open."""
        for pack in _open_checkpoints():
            if _is_forward(pack):
                frame = _variable(pack, "frame")
                self.regions.setdefault(frame, Region()).add(i, forward)
        if _is_reentrant_forward():
            here = (torch.autograd._get_sequence_nr(), threading.get_ident())
            passes = self.reentrant.setdefault(i, deque())
            if not passes or passes[-1][:2] != here:
                passes.append(NumberedRegion(*here, Region()))
            passes[-1].region.add(i, forward)
            if len(passes) > MAX_REENTRANT:
                self.forgotten[i] = passes.popleft().number

    def recall(self, i: int) -> ForwardState | None:
        """Return the forward pass that block i is recomputed for; None if it runs first.

        Raises:
            RuntimeError: the pass is not stored, or cannot be identified.
        """
        if not _in_backward():
            return None
        packs = [pack for pack in _open_checkpoints() if _is_recomputation(pack)]
        if not packs:
            return self._recall_reentrant(i) if _is_reentrant_recomputation() else None
        region = self.regions.get(_variable(packs[-1], "target_frame_ref")())
        if region is None:
            raise RuntimeError(
                "a block of a reduced model was recomputed in backward, but it was not reduced so "
                "when its forward ran; call reduce_ and unreduce_ before the forward"
            )
        return region.next(i, packs[-1])

    def _recall_reentrant(self, i: int) -> ForwardState:
        number = torch._C._current_autograd_node()._sequence_nr()
        passes = self.reentrant.get(i, ())
        if len({each.thread for each in passes}) > 1:
            raise RuntimeError(
                "re-entrant checkpoints of a reduced model ran in several threads, so the forward "
                "pass of a recomputed block cannot be identified; pass use_reentrant=False"
            )
        found = [each.region for each in passes if each.number > number][:1]
        if not found or number < self.forgotten.get(i, -1):
            raise RuntimeError(
                "a block of a reduced model was recomputed in backward, but its forward is not "
                f"among the last {MAX_REENTRANT}; run backward sooner"
            )
        return found[0].next(i, torch._C._current_graph_task_id())


def is_recomputing() -> bool:
    """Return whether a checkpoint recomputes the running code within a backward pass."""
    if not _in_backward():
        return False
    return any(map(_is_recomputation, _open_checkpoints())) or _is_reentrant_recomputation()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_reentrant_recomputation() -> bool:
    """Return whether the backward of a re-entrant checkpoint runs this code.

    A backward hook that starts a forward pass is not a recomputation; only a recomputation runs
    with gradients in torch.utils.checkpoint without an open checkpoint.
    """
    frame, in_checkpoint = inspect.currentframe(), False
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if frame.f_code.co_qualname == "CheckpointFunction.backward":
            return True
        in_checkpoint |= frame.f_globals.get("__name__") == CHECKPOINT_MODULE
        frame = frame.f_back
    if in_checkpoint and torch.is_grad_enabled() and not _open_checkpoints():
        raise _unknown_checkpoint("CheckpointFunction.backward")
    return False


def _is_reentrant_forward() -> bool:
    """Return whether an autograd.Function's forward runs, which alone disables both modes."""
    is_off = not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled()
    return is_off and not torch.is_inference_mode_enabled()


def _open_checkpoints() -> list[Pack]:
    """Return the pack hooks of the open non-re-entrant checkpoints, outermost first."""
    hooks = []
    while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    packs = [inspect.unwrap(pack) for pack, _ in reversed(hooks)]
    packs = [pack for pack in packs if getattr(pack, "__module__", None) == CHECKPOINT_MODULE]
    for pack in packs:
        if not _is_forward(pack) and not _is_recomputation(pack):
            raise _unknown_checkpoint(f"a hook {pack.__qualname__}")
    return packs


def _is_forward(pack: Pack) -> bool:
    return pack.__qualname__.startswith("_checkpoint_hook.")


def _is_recomputation(pack: Pack) -> bool:
    return pack.__qualname__.startswith("_recomputation_hook.")


def _variable(pack: Pack, name: str) -> Any:
    """Return a variable that torch's checkpoint has bound to its hook."""
    variables = inspect.getclosurevars(pack).nonlocals
    if name not in variables:
        raise _unknown_checkpoint(f"{name} in {pack.__qualname__}")
    return variables[name]


def _unknown_checkpoint(what: str) -> RuntimeError:
    return RuntimeError(
        f"checkpoint: expected {CHECKPOINT_MODULE} as elip_models reads it, got torch "
        f"{torch.__version__} with other internals ({what}), so a recomputed block would select "
        "its tokens again; install a torch release that elip_models supports, or switch "
        "activation checkpointing off"
    )
