"""Errors that end a run."""

import signal


class TrainingError(RuntimeError):
    """A run that cannot start, resume or continue. The message contains a remedy."""


class Stopped(TrainingError):
    """A run that a signal ended. Its last checkpoint is complete."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)

    @property
    def status(self) -> int:
        """Return the exit status of a process that a signal ended: 128 plus the signal's number."""
        return 128 + self.signal
