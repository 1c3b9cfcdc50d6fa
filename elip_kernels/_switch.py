"""A setting of the process that `with` blocks of several threads may share."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class ProcessSwitch:
    """A switch that is on while at least one block is open, in any thread.

    Blocks may overlap, and a generator may close its block in another thread: the last block to end
    turns the switch off.

    Args:
        turn_on: is called when the first block begins; what it returns is passed to `turn_off`.
        turn_off: is called when the last block ends.

    Attributes:
        is_on: whether a block is open.
    """

    def __init__(
        self,
        turn_on: Callable[[], Any] = lambda: None,
        turn_off: Callable[[Any], object] = lambda before: None,
    ) -> None:
        self.is_on = False
        self._turn_on, self._turn_off = turn_on, turn_off
        self._lock, self._blocks, self._before = threading.Lock(), 0, None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Turn the switch on inside the block."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            was_on, self._blocks = self.is_on, self._blocks + change
            self.is_on = self._blocks > 0
            if self.is_on and not was_on:
                self._before = self._turn_on()
            elif was_on and not self.is_on:
                self._turn_off(self._before)
