"""Chart of a study as SVG for light and dark pages: differences in quality, and costs.

It shows the first two metrics of the study's quality.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.analysis import against
from benchmarks.studies.results import Document, Interval, is_loss, relative_cost, relative_time
from elip_models.analysis.chart_style import GREY, METADATA, STYLE, write_figure
from elip_models.validation import require_extra

with require_extra("benchmarks.studies.chart"):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

BETTER, WORSE = "#0072b2", "#d55e00"
METRICS = 2  # metrics that the rows show


class Point(NamedTuple):
    """An arm with its differences from the reference by metric, and its relative costs."""

    arm: str
    gaps: dict[str, Interval | None]
    flops: float | None
    time: float | None


def draw(document: Document, path: Path) -> Path:
    """Draw the differences from the first reference and their confidence intervals.

    Each arm is a row with its FLOPs and time.
    """
    metrics = document["quality"][:METRICS]
    points = _points(document, metrics)
    with matplotlib.rc_context(STYLE):
        figure = plt.figure(figsize=(9, 1.1 + 0.25 * len(points)), layout="constrained")
        _draw_rows(figure.subplots(1, len(metrics) + 1, sharey=True), document, points, metrics)
        write_figure(figure, path, bbox_inches="tight", metadata=METADATA)
        plt.close(figure)
    return path


def _points(document: Document, metrics: Sequence[str]) -> list[Point]:
    """Return the measured arms, without the parent of the reference."""
    reference, points = document["references"][0], []
    compared = against(document, reference, metrics)
    for arm in document["arms"]:
        gaps = {metric: compared.get((arm, metric)) for metric in metrics}
        if arm == reference:
            gaps = dict.fromkeys(metrics, Interval(0.0, None))
        if any(gaps.values()):
            costs = relative_cost(document, arm), relative_time(document, arm)
            points.append(Point(arm, gaps, *costs))
    return points


def _draw_rows(
    axes: Sequence[Axes], document: Document, points: Sequence[Point], metrics: Sequence[str]
) -> None:
    """Draw differences on the left and costs on the right, the most expensive arm on top."""
    points = sorted(reversed(points), key=lambda point: round(point.flops or 0, 1))
    axes[0].set_yticks(range(len(points)), [point.arm for point in points])
    axes[0].set_ylim(-0.5, len(points) - 0.5)  # no marker touches an edge
    for metric, axis in zip(metrics, axes[:-1], strict=True):
        axis.axvline(0, color=GREY, linewidth=1)
        axis.set_xlabel(_label(document, metric))
        for row, point in enumerate(points):
            if gap := point.gaps[metric]:
                style = {"color": _colour(gap, metric), "marker": "o", "capsize": 2, "linewidth": 1}
                mean, half = _scaled(gap, metric)
                axis.errorbar(mean, row, xerr=half, **style)
    costs = {
        "FLOPs": [point.flops for point in points],
        "time": [point.time for point in points],
    }
    for (name, values), fill in zip(costs.items(), (GREY, "none"), strict=True):
        known = [(value, row) for row, value in enumerate(values) if value is not None]
        x, y = zip(*known, strict=True) if known else ((), ())
        axes[-1].scatter(x, y, marker="D", facecolors=fill, edgecolors=GREY, label=name)
    axes[-1].set_xlabel(f"cost, {document['references'][0]} = 1")
    axes[-1].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    for axis in axes:
        axis.grid(color=GREY, alpha=0.3)


def _scaled(gap: Interval, metric: str) -> tuple[float, float]:
    """Return mean and half interval, in percentage points if the metric is a share."""
    scale = 1 if is_loss(metric) else 100
    return scale * gap.mean, scale * (gap.half or 0)


def _colour(gap: Interval, metric: str) -> str:
    """Return grey if the difference is not significant."""
    if not gap.is_significant:
        return GREY
    return BETTER if (gap.mean < 0) == is_loss(metric) else WORSE


def _label(document: Document, metric: str) -> str:
    unit, better = ("", "lower") if is_loss(metric) else (", points", "higher")
    return (
        f"{metric}{unit}\nchange from {document['references'][0]}\n"
        f"({better} is better; simultaneous 95% CI)"
    )
