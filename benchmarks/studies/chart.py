"""Chart of a study as SVG for light and dark pages: differences in quality, and costs.

It shows the first two metrics of the study's quality.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.analysis import against
from benchmarks.studies.results import (
    Document,
    Interval,
    is_loss,
    relative_cost,
    relative_time,
)
from elip_models.analysis.chart_style import GREY, METADATA, STYLE, write_figure
from elip_models.validation import require_extra

with require_extra("benchmarks.studies.chart"):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", GREY)
MARKERS = "os^vDP*X<>"
BETTER, WORSE = "#0072b2", "#d55e00"
CURVE = 3  # families with at least so many FLOPs shares are drawn as a curve, others as rows
METRICS = 2  # metrics that the rows show


class Point(NamedTuple):
    """An arm with its differences from the reference by metric, and its relative costs."""

    arm: str
    gaps: dict[str, Interval | None]
    flops: float | None
    time: float | None


def draw(document: Document, path: Path) -> Path:
    """Draw the differences from the first reference and their confidence intervals.

    Each arm is a row with its FLOPs and time. A family of arms at several FLOPs shares is a curve
    of the first metric over FLOPs.
    """
    metrics = document["quality"][:METRICS]
    families = _families(document, metrics)
    curves = {name: points for name, points in families.items() if len(points) >= CURVE}
    rows = [point for name, points in families.items() if name not in curves for point in points]
    heights = [4.0] if curves else []
    heights += [1.1 + 0.25 * len(rows)] if rows else []
    with matplotlib.rc_context(STYLE):
        figure = plt.figure(figsize=(9, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        if curves:
            _draw_curves(parts[0].subplots(), document, curves, metrics[0])
        if rows:
            axes = parts[-1].subplots(1, len(metrics) + 1, sharey=True)
            _draw_rows(axes, document, rows, metrics)
        write_figure(figure, path, bbox_inches="tight", metadata=METADATA)
        plt.close(figure)
    return path


def _families(document: Document, metrics: Sequence[str]) -> dict[str, list[Point]]:
    """Return the measured arms by family, without the parent of the reference."""
    reference = document["references"][0]
    families: dict[str, list[Point]] = {}
    compared = against(document, reference, metrics)
    for arm, settings in document["arms"].items():
        gaps = {metric: compared.get((arm, metric)) for metric in metrics}
        if arm == reference:
            gaps = dict.fromkeys(metrics, Interval(0.0, None))
        if any(gaps.values()):
            costs = relative_cost(document, arm), relative_time(document, arm)
            families.setdefault(settings["family"], []).append(Point(arm, gaps, *costs))
    return families


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


def _draw_curves(
    axis: Axes, document: Document, curves: dict[str, list[Point]], metric: str
) -> None:
    """Draw one line per family, shifted sideways so that error bars do not overlap."""
    axis.axhline(0, color=GREY, linewidth=1)
    axis.grid(color=GREY, alpha=0.3)
    middle = (len(curves) - 1) / 2
    for index, ((family, points), colour, marker) in enumerate(
        zip(curves.items(), cycle(COLOURS), cycle(MARKERS))
    ):
        known = sorted(
            (point.flops + 0.006 * (index - middle), *_scaled(point.gaps[metric], metric))
            for point in points
            if point.flops is not None and point.gaps[metric]
        )
        style = {"color": colour, "marker": marker, "capsize": 2, "linewidth": 1}
        if known:
            axis.errorbar(*zip(*known, strict=True), label=family, **style)
    axis.set_xlabel(f"FLOPs, {document['references'][0]} = 1")
    axis.set_ylabel(_label(document, metric))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


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
