"""What belongs to the calls of one thread or task: the package's only context variable.

The variable has items. An item lasts until the `with` block that added it ends, wherever that is,
or until it is removed. Its class says what it is:

    Guide, Pairing     which text guides a reduced model, here
    Record             a list that receives what a reduced model keeps, here
    DenseCall          a call of a method that returns the tokens of several blocks, here
    IgnoredWarning     a warning that is not given, in user_warnings.py
    others             what a forward pass of a language model has beside its arguments, in vlm

A compiled graph cannot read a context variable: `GraphGuidance` (engine/reduction.py) has the
guidance for graphs. A block that activation checkpointing runs again is guided as its forward pass
was: see engine/recomputation.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class Block:
    """A `with` block, which may end in another thread or task than it began in."""

    def __init__(self) -> None:
        self.is_open = True


_ITEMS: ContextVar[tuple[tuple[Any, Block], ...]] = ContextVar("elip_models", default=())


def items(kind: type[T]) -> list[T]:
    """Return the items of a class in this thread or task, the most recent one last."""
    return [item for item, block in _ITEMS.get() if type(item) is kind and block.is_open]


def latest(kind: type[T]) -> T | None:
    """Return the most recent item of a class in this thread or task, or None."""
    return next(iter(items(kind)[::-1]), None)


def add(item: Any, block: Block | None = None) -> None:
    """Add an item until the block ends; without a block, until it is removed."""
    _ITEMS.set((*_ITEMS.get(), (item, block or Block())))


def remove(is_removed: Callable[[Any], bool] = lambda item: False) -> None:
    """Remove items of this thread or task, and those whose blocks have ended."""
    _ITEMS.set(tuple((i, b) for i, b in _ITEMS.get() if b.is_open and not is_removed(i)))


def put(item: Any) -> None:
    """Add an item in place of others of its class, until it is removed."""
    remove(lambda other: type(other) is type(item))
    add(item)


def take(kind: type[T]) -> T | None:
    """Remove the most recent item of a class, and return it; None if there is none."""
    last = latest(kind)
    remove(lambda item: item is last)
    return last


@contextmanager
def within(item: Any) -> Iterator[None]:
    """Add an item to those of this thread or task inside the block."""
    block = Block()
    add(item, block)
    try:
        yield
    finally:
        block.is_open = False
        remove()


@dataclass
class Recomputation:
    """A recomputation, by activation checkpointing, of blocks of forward passes.

    forward: the `ForwardState` whose label is read. other: that of another pass in the same
        checkpoint, while its blocks run again.
    """

    forward: Any
    other: Any = None


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


class DenseCall(NamedTuple):
    """A call of a method that returns the tokens of several blocks of the reduced model."""

    reduction: object


def set_guide(reduction: object, text_cls: Tensor | None, owner: object) -> None:
    """Guide the forward passes of this thread or task until `owner` removes the text."""
    guide = guide_of(reduction)
    recomputation = None if guide is None else guide.recomputation
    block = owner if isinstance(owner, Block) else None
    add(Guide(reduction, text_cls, owner, recomputation), block)


def drop_guide(owner: object) -> None:
    """Remove the texts that `owner` has set, whatever was set after them."""
    if isinstance(owner, Block):
        owner.is_open = False
    remove(lambda item: type(item) is Guide and item.owner is owner)


def guide_of(reduction: object) -> Guide | None:
    """Return the most recent guide of the reduction in this thread or task, or None."""
    for guide in reversed(items(Guide)):
        if guide.reduction is reduction:
            return guide
    return None


def is_paired(reduction: object) -> bool:
    """Return whether the texts of the model's calls guide it in this thread or task."""
    return any(pairing.reduction is reduction for pairing in items(Pairing))


def is_dense_call(reduction: object) -> bool:
    """Return whether a method that returns the tokens of several blocks runs the model here."""
    return any(call.reduction is reduction for call in items(DenseCall))


def records_of(reduction: object) -> list[list[Any]]:
    """Return the lists that record the reduction in this thread or task."""
    return [record.infos for record in items(Record) if record.reduction is reduction]
