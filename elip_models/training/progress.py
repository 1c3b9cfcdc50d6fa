"""The progress bar of a training run, and the expected time of its steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from elip_models.tasks.task import Progress as Callback
from elip_models.validation import require_extra

with require_extra("elip_models.training"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

TIMED_STEPS = 4
"""Steps whose time, after the slower first one, gives the expected time of the run."""


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
