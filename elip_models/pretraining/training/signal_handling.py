"""Handling of SIGTERM and SIGINT: a run ends between two steps, after one more checkpoint."""

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context manager that stores the first signal; a second one has its usual effect.

    It stores none outside the main thread, because Python calls handlers only there.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # its number
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def received(self, accelerator: "Accelerator", *, may_wait: bool) -> bool:
        """Return whether a signal was received by this process or, of several, by any.

        The result for several processes is False unless the step `may_wait` for all of them.
        """
        if accelerator.num_processes > 1:
            if not may_wait:
                return False
            number = torch.tensor([self.signal or 0], device=accelerator.device)
            self.signal = int(accelerator.gather(number).max()) or None
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
