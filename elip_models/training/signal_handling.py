"""SIGTERM and SIGINT while a run trains: it ends between two steps, with one more checkpoint.

A second signal ends the process at once, and so does a checkpoint that takes longer than `PATIENCE`
seconds: what asks a process to end, a scheduler or `torchrun`, kills it soon after.
"""

import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 60.0  # seconds


class Stop:
    """Inside, the first signal is remembered; outside, signals do what they did.

    `signal` is the number of the one that came, None before. In a thread that is not the main one
    nothing is heard, for Python calls handlers in that alone.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._patience: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._patience is not None:
            self._patience.cancel()  # the checkpoint is there

    def came(self, accelerator: "Accelerator", *, may_wait: bool) -> bool:
        """Whether one came; of several processes, to any, as all of them are told.

        Args:
            may_wait: the processes are at a step at which they wait for each other anyway. At other
                steps nothing is asked of them, and the answer is no.
        """
        if accelerator.num_processes > 1:
            if not may_wait:
                return False
            number = torch.tensor([self.signal or 0], device=accelerator.device)
            self.signal = int(accelerator.gather(number).max()) or None
        return self.signal is not None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        self._patience = threading.Timer(PATIENCE, os._exit, (128 + number,))
        self._patience.daemon = True
        self._patience.start()
