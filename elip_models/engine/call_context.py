"""The context of a call of a reduced model: its guidance, its records, and its recomputation.

Guidance, records and dense calls belong to the thread or task that sets them: context variables
store them. A compiled graph cannot read a context variable, so a `GraphPass` has attributes for
graphs, and an op in the graph raises if another thread or task has set the text.

A block that activation checkpointing runs again is guided as its forward pass was: see
`recomputation.py`.
"""

import threading
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elip_models.call_variable import Block, CallVariable
from elip_models.engine.forward_state import ForwardState


@dataclass
class Recomputation:
    """A recomputation, by activation checkpointing, of blocks of forward passes.

    forward: the pass whose label is read. other: another pass in the same checkpoint, while its
        blocks run again.
    """

    forward: ForwardState
    other: ForwardState | None = None


class Guide(NamedTuple):
    """A text (B, D), or None, that guides a reduction until `owner` removes it.

    recomputation: the recomputation in which it guides, or None.
    """

    reduction: object
    text_cls: Tensor | None
    owner: object
    recomputation: Recomputation | None = None


class Pairing(NamedTuple):
    """The texts of the whole model's own calls guide this reduction, each its image."""

    reduction: object


class Record(NamedTuple):
    """A list that receives what a reduction records, such as the `StageInfo` of every step."""

    reduction: object
    infos: list[Any]


GUIDES: CallVariable[Guide] = CallVariable("GUIDES")
RECORDS: CallVariable[Record] = CallVariable("RECORDS")
PAIRINGS: CallVariable[Pairing] = CallVariable("PAIRINGS")
DENSE_CALLS: ContextVar[tuple[object, ...]] = ContextVar("DENSE_CALLS", default=())
"""The reductions whose models run a method that returns the tokens of several blocks."""
_GRAPH = threading.local()
"""`text_cls`: the text that the graph running in this thread has encoded for itself."""


def set_guide(reduction: object, text_cls: Tensor | None, owner: object) -> None:
    """Guide the forward passes of this thread or task until `owner` removes the text."""
    guide = guide_of(reduction)
    recomputation = None if guide is None else guide.recomputation
    block = owner if isinstance(owner, Block) else Block()
    GUIDES.add(Guide(reduction, text_cls, owner, recomputation), block)


def drop_guide(owner: object) -> None:
    """Remove the texts that `owner` has set, whatever was set after them."""
    if isinstance(owner, Block):
        owner.is_open = False
    GUIDES.remove(lambda guide: guide.owner is owner)


def guide_of(reduction: object) -> Guide | None:
    """Return the most recent guide of the reduction in this thread or task, or None."""
    for guide in reversed(GUIDES.get()):
        if guide.reduction is reduction:
            return guide
    return None


def is_paired(reduction: object) -> bool:
    """Return whether the texts of the model's calls guide it in this thread or task."""
    return any(pairing.reduction is reduction for pairing in PAIRINGS.get())


def recomputing(reduction: object, forward: ForwardState) -> AbstractContextManager[None]:
    """Guide the calls inside, in this thread, as the pass that they recompute was guided."""
    recomputation = Recomputation(forward)
    return GUIDES.within(Guide(reduction, forward.text_cls, recomputation, recomputation))


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
    if not is_mine and not _in_backward():  # the forward has checked
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


def _in_backward() -> bool:
    """Return whether a graph's backward runs, where a checkpoint in the graph runs the op again.

    PyTorch has no public name for this; `torch.utils.checkpoint` reads the same number.
    """
    return torch._C._current_graph_task_id() != -1


@own_guidance.register_fake
@set_guidance.register_fake
def _(text_cls: Tensor) -> Tensor:
    return torch.empty_like(text_cls)


def records_of(reduction: object) -> list[list[Any]]:
    """Return the lists that record the reduction in this thread or task."""
    return [record.infos for record in RECORDS.get() if record.reduction is reduction]
