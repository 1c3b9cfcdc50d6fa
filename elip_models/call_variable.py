"""Variables of a thread or task whose items last until the `with` blocks that added them end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Block:
    """A `with` block, which may end in another thread or task than it began in."""

    def __init__(self) -> None:
        self.is_open = True


class CallVariable(Generic[T]):
    """The items of a thread or task, each until its block ends, wherever it ends.

    A generator may enter a block in one context and be closed in another, whose variables differ.
    """

    def __init__(self, name: str) -> None:
        self._items: ContextVar[tuple[tuple[T, Block], ...]] = ContextVar(name, default=())

    def get(self) -> tuple[T, ...]:
        """Return the items, the most recent one last."""
        return tuple(item for item, block in self._items.get() if block.is_open)

    def add(self, item: T, block: Block) -> None:
        """Add an item until the block ends."""
        self._items.set((*self._items.get(), (item, block)))

    def remove(self, is_removed: Callable[[T], bool] = lambda item: False) -> None:
        """Remove items of this thread or task, and those whose blocks have ended."""
        self._items.set(
            tuple((i, b) for i, b in self._items.get() if b.is_open and not is_removed(i))
        )

    @contextmanager
    def within(self, item: T) -> Iterator[None]:
        """Add an item to those of this thread or task inside the block."""
        block = Block()
        self.add(item, block)
        try:
            yield
        finally:
            block.is_open = False
            self.remove()
