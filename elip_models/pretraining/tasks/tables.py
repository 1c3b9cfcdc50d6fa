"""Tables for a console."""

from typing import TYPE_CHECKING

from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.tasks.tables"):
    from rich.markup import escape
    from rich.table import Table

if TYPE_CHECKING:
    from elip_models.pretraining.tasks.task import TaskScores


def score_table(scores: "TaskScores") -> Table:
    """Return scores in percent with their 95% confidence intervals, baselines and notes."""
    examples = f"{scores.num_examples} examples"
    title = f"{scores.task}: {examples}" if scores.task else examples
    notes = [f"{name}: {note}" for name, note in scores.notes.items()]
    table = Table(title=title, caption=escape("\n".join(notes)), caption_justify="left")
    for column in ("", "%", "95% interval", *scores.baselines):
        table.add_column(column, justify="right" if column else "left")
    for name, score in scores.scores.items():
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
        others = (baseline.get(name) for baseline in scores.baselines.values())
        shown = ("" if value is None else f"{100 * value:.1f}" for value in others)
        table.add_row(escape(name), f"{100 * score.mean:.1f}", interval, *shown)
    return table
