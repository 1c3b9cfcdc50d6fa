"""The progress bar of a training run, and the time of its steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from elip_models.pretraining.tasks.task import Progress as Callback
from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.training"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

WARMUP_STEPS = 5
"""First steps of a process, which are slower: the time of the others excludes them."""


def progress_bar(console: Console) -> Progress:
    """Return bars, shown on a terminal only; `add_task` takes what a bar counts as `unit`."""
    counts = TextColumn("{task.fields[unit]}"), MofNCompleteColumn(), BarColumn()
    left = TimeRemainingColumn(), TextColumn("left")
    columns = (*counts, TextColumn("{task.description}"), *left)
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def evaluation_bars(bars: Progress) -> Iterator[Callback]:
    """Yield a function that adds a bar for each unit of an evaluation; they go at its end."""
    shown: dict[str, TaskID] = {}

    def update(unit: str, done: int, total: int) -> None:
        if unit not in shown:
            shown[unit] = bars.add_task("", total=total, unit=unit)
        bars.update(shown[unit], completed=done)

    try:
        yield update
    finally:
        for each in shown.values():
            bars.remove_task(each)


class StepTimer:
    """Measures the time of the steps after `first`."""

    def __init__(self, first: int, device: torch.device) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        self._first, self._start = first, time.perf_counter()

    def seconds(self, step: int) -> float:
        """Return the mean seconds of a step; `step` is the last one, and the device is idle."""
        return (time.perf_counter() - self._start) / (step - self._first)

    def left(self, step: int, total: int) -> timedelta:
        """Return the expected time of the steps behind `step`, in whole seconds."""
        return timedelta(seconds=round((total - step) * self.seconds(step)))
