"""Scores as tables for a console."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from elip_models.validation import extra

with extra("elip_models.tasks.tables"):
    from rich.table import Table

if TYPE_CHECKING:
    from elip_models.tasks.retrieval import RetrievalScores
    from elip_models.tasks.zero_shot import ZeroShotScores


def retrieval_table(scores: "RetrievalScores") -> Table:
    """Recalls in percent, chance in brackets."""
    names = {"image_to_text": "image to text", "text_to_image": "text to image"}
    ks = [key.rsplit("_r", 1)[1] for key in scores.recalls if key.startswith("image_to_text")]
    table = Table(
        title=f"{scores.num_images} images, {scores.num_texts} captions (chance in brackets)"
    )
    table.add_column("retrieval")
    for k in ks:
        table.add_column(f"R@{k} %", justify="right")
    for key, name in names.items():
        keys = [f"{key}_r{k}" for k in ks]
        table.add_row(name, *_percents(scores.recalls, scores.chance, keys))
    return table


def zero_shot_table(scores: "ZeroShotScores") -> Table:
    """Accuracies in percent, chance in brackets."""
    table = Table(
        title=f"{scores.num_images} images, {scores.num_classes} classes (chance in brackets)"
    )
    table.add_column("zero-shot")
    for key in scores.accuracies:
        table.add_column(f"top-{key.rpartition('top')[2]} %", justify="right")
    table.add_row("accuracy", *_percents(scores.accuracies, scores.chance, scores.accuracies))
    return table


def _percents(
    found: dict[str, float], chance: dict[str, float], keys: Iterable[str]
) -> Iterator[str]:
    return (f"{100 * found[key]:.1f} ({100 * chance[key]:.1f})" for key in keys)
