"""The progress bars of a training run, by rich."""

from collections.abc import Iterator
from contextlib import contextmanager

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
        for task in shown.values():
            bars.remove_task(task)
