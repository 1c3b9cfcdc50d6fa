"""Why a run does not go on."""

import signal


class TrainingError(RuntimeError):
    """A run that cannot start, continue or go on; the message says what to do."""


class Stopped(TrainingError):
    """A run that a signal ended, after its checkpoint."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended, as shells count it."""
        return 128 + self.signal
