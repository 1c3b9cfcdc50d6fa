"""Whose text guides a forward.

A text belongs to the thread or task that set it: a context variable holds it. A compiled graph
cannot read one. For graphs it is a plain attribute of the `Reduction`, and an op in the graph
refuses, when it runs, a text that another thread or task has set.
"""

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elip_models.reduction.state import Reduction


class Guide(NamedTuple):
    """A text (B, D), or None, that guides a reduction; `by`: who has set it."""

    reduction: "Reduction"
    text_cls: Tensor | None
    by: object


GUIDES: ContextVar[tuple[Guide, ...]] = ContextVar("GUIDES", default=())
"""Of this thread or task, the latest last."""
_GRAPH = threading.local()
"""`text_cls`: what the graph that runs in this thread has made its guidance."""


def set_guide(reduction: "Reduction", text_cls: Tensor | None, by: object) -> None:
    """From now on this thread's or task's forwards are guided so, until `by` drops it."""
    GUIDES.set((*GUIDES.get(), Guide(reduction, text_cls, by)))


def drop_guide(by: object) -> None:
    """What `by` has set guides no more, whatever was set after it."""
    GUIDES.set(tuple(guide for guide in GUIDES.get() if guide.by is not by))


def guide_of(reduction: "Reduction") -> Guide | None:
    """What guides the reduction in this thread or task."""
    guides = (guide for guide in reversed(GUIDES.get()) if guide.reduction is reduction)
    return next(guides, None)


def _op(name: str) -> Any:
    tags = (torch.Tag.cudagraph_unsafe,)  # a replay of kernels alone would not ask
    return torch.library.custom_op(f"elip::{name}", mutates_args=(), tags=tags)


@_op("own_guidance")
def own_guidance(text_cls: Tensor) -> Tensor:
    """A copy of the guidance (B, D) that a graph reads.

    Raises:
        RuntimeError: it is not this thread's or task's.
    """
    mine = [guide.text_cls for guide in GUIDES.get()] + [getattr(_GRAPH, "text_cls", None)]
    is_mine = any(t is not None and t.data_ptr() == text_cls.data_ptr() for t in mine)
    is_backward = torch._C._current_graph_task_id() != -1  # of a forward that was asked
    if not is_mine and not is_backward:
        raise RuntimeError(
            "guidance: expected a compiled model to be guided by one thread or task at a time, got "
            "a call while another guides it; give each its own copy.deepcopy(model), compiled"
        )
    return text_cls.clone()


@_op("set_guidance")
def set_guidance(text_cls: Tensor) -> Tensor:
    """A copy of text_cls (B, D), which is this thread's guidance in the graph that runs."""
    _GRAPH.text_cls = text_cls.clone()
    return _GRAPH.text_cls


@own_guidance.register_fake
@set_guidance.register_fake
def _(text_cls: Tensor) -> Tensor:
    return torch.empty_like(text_cls)
