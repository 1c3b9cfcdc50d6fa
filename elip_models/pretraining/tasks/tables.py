"""Tables of scores for a console."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.tasks.tables"):
    from rich.markup import escape
    from rich.table import Table

if TYPE_CHECKING:
    from elip_models.intervals import Interval
    from elip_models.pretraining.data import SkipReport
    from elip_models.pretraining.tasks.composition import CompositionScores
    from elip_models.pretraining.tasks.retrieval import RetrievalScores
    from elip_models.pretraining.tasks.task import TaskScores
    from elip_models.pretraining.tasks.zero_shot import ZeroShotScores

MAX_CATEGORIES = 20
"""Largest number of categories of a compositional benchmark that a table lists."""


def data_table(name: str, size: int, report: "SkipReport", captions: Sequence[str]) -> Table:
    """Return how much of a source of `size` samples was read, and how long the captions are."""
    words = [len(text.split()) for text in captions] or [0]
    table = Table(show_header=False)
    table.add_row("data", name)
    table.add_row("samples", f"{report.seen} of {size} read")
    table.add_row("unreadable", f"{len(report.reasons)} ({report.share:.1%})")
    table.add_row(
        "captions", f"{len(captions)}, {len(captions) / max(1, report.seen):.2f} per sample"
    )
    table.add_row("words per caption", f"{fmean(words):.1f}, at most {max(words)}")
    return table


def retrieval_table(scores: "RetrievalScores") -> Table:
    """Return recalls in percent with 95% intervals, and chance in brackets."""
    names = {"image_to_text": "image to text", "text_to_image": "text to image"}
    ks = [key.rsplit("_r", 1)[1] for key in scores.recalls if key.startswith("image_to_text")]
    table = Table(
        title=f"{scores.num_images} images, {scores.num_texts} captions: 95% interval (chance)"
    )
    table.add_column("retrieval")
    for k in ks:
        table.add_column(f"R@{k} %", justify="right")
    for key, name in names.items():
        keys = [f"{key}_r{k}" for k in ks]
        table.add_row(name, *_percents(scores.intervals, scores.chance, keys))
    return table


def zero_shot_table(scores: "ZeroShotScores") -> Table:
    """Return accuracies in percent with 95% intervals, and chance in brackets."""
    table = Table(
        title=f"{scores.num_images} images, {scores.num_classes} classes: 95% interval (chance)"
    )
    table.add_column("zero-shot")
    for key in scores.accuracies:
        table.add_column(f"top-{key.rpartition('top')[2]} %", justify="right")
    table.add_row("accuracy", *_percents(scores.intervals, scores.chance, scores.accuracies))
    return table


def task_table(scores: "TaskScores") -> Table:
    """Return scores in percent with their 95% confidence intervals, and baselines."""
    table = Table(title=f"{scores.task}: {scores.num_examples} examples")
    for column in ("", "%", "95% interval", *scores.baselines):
        table.add_column(column, justify="right" if column else "left")
    for name, found in scores.scores.items():
        others = (each.get(name) for each in scores.baselines.values())
        shown = ("" if value is None else f"{100 * value:.1f}" for value in others)
        table.add_row(name, f"{100 * found.mean:.1f}", _ends(found), *shown)
    return table


def composition_table(scores: "CompositionScores") -> Table:
    """Return scores in percent with 95% intervals, and chance in brackets, also by category.

    No category is listed if there are more than `MAX_CATEGORIES`.
    """
    guided = ", each caption guides its image" if scores.guided else ""
    table = Table(
        title=f"{scores.benchmark}, {scores.num_examples} examples, by {scores.method}{guided}: "
        "95% interval (chance)"
    )
    table.add_column("examples")
    metrics = [name for name in scores.scores if name != "macro_accuracy"]
    for name in metrics:
        table.add_column(f"{name.replace('_', ' ')} %", justify="right")
    table.add_row("all", *_percents(scores.scores, scores.chance, metrics))
    number, notes = len(scores.categories), []
    if scores.num_without_image:
        notes.append(f"{scores.num_without_image} examples left out, whose images are unreadable")
    if scores.num_same_tokens:
        notes.append(f"{scores.num_same_tokens} with a wrong caption of the same tokens: ties")
    if number > MAX_CATEGORIES:
        notes.append(f"{number} categories: see --output")
    table.caption = "\n".join(notes)
    if "macro_accuracy" in scores.scores:
        mean = _percents(scores.scores, scores.chance, ["macro_accuracy"])
        table.add_row(f"mean of {number} categories", *mean)
    for name, found in scores.categories.items() if number <= MAX_CATEGORIES else ():
        label = f"{escape(name)} ({scores.category_sizes[name]})"
        table.add_row(label, *_percents(found, scores.chance, metrics))
    return table


def _percents(
    found: "dict[str, Interval]", chance: dict[str, float], keys: Iterable[str]
) -> Iterator[str]:
    for key in keys:
        yield f"{100 * found[key].mean:.1f}, {_ends(found[key])} ({100 * chance[key]:.1f})"


def _ends(interval: "Interval") -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
