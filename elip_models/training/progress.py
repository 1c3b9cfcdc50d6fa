"""The progress bar of a training run, and the expected time of its steps."""

import time
from datetime import timedelta

import torch

from elip_models.validation import require_extra

with require_extra("elip_models.training"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

TIMED_STEPS = 4
"""Steps whose time, after the slower first one, gives the expected time of the run."""


def progress_bar(console: Console, unit: str) -> Progress:
    """Return a bar of counted units, shown on a terminal only."""
    counts = TextColumn(unit), MofNCompleteColumn(), BarColumn()
    left = TimeRemainingColumn(), TextColumn("left")
    columns = (*counts, TextColumn("{task.description}"), *left)
    return Progress(*columns, console=console, disable=not console.is_terminal)


class ExpectedTime:
    """Prints once, after the first steps of a process, the expected time of the others."""

    def __init__(self, console: Console, device: torch.device) -> None:
        self._console = console
        self._device = device

    def after(self, done: int, remaining: int) -> None:
        """Note the end of a step: `done` steps of this process are over, `remaining` follow."""
        if done not in (1, 1 + TIMED_STEPS):
            return
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        if done == 1:
            self._start = time.perf_counter()
        elif remaining:
            seconds = (time.perf_counter() - self._start) / TIMED_STEPS
            self._console.print(
                f"about {duration(remaining * seconds)} for the {remaining} steps that remain, "
                "without evaluation and report"
            )


def duration(seconds: float) -> timedelta:
    """Return whole seconds, which print as 0:05:12."""
    return timedelta(seconds=round(seconds))
