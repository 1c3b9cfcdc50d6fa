"""The progress bars of a training run, by rich."""

from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.training"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )


def progress_bar(console: Console) -> Progress:
    """Return bars, shown on a terminal only; `add_task` takes what a bar counts as `unit`."""
    counts = TextColumn("{task.fields[unit]}"), MofNCompleteColumn(), BarColumn()
    left = TimeRemainingColumn(), TextColumn("left")
    columns = (*counts, TextColumn("{task.description}"), *left)
    return Progress(*columns, console=console, disable=not console.is_terminal)
