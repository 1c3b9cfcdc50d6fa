"""The chart of a study as SVG, readable on light and on dark pages: quality against cost."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from elip_models.analysis.chart_style import GREY, METADATA, STYLE
from elip_models.study.page import is_loss
from elip_models.study.results import Document, difference, relative_cost, relative_time
from elip_models.validation import extra

with extra("elip_models.study.chart"):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", GREY)
MARKERS = "os^vDP*X<>"
COSTS: dict[str, Callable[[Document, str], float | None]] = {
    "training FLOPs": relative_cost,
    "training time": relative_time,
}


def draw(document: Document, path: Path) -> Path:
    """Draws the first metric of `quality`, less that of the first reference seed by seed, against
    each cost that is known; an arm of several shares of FLOPs is a line, and a bar is the interval
    over seeds."""
    metric, reference = document["quality"][0], document["references"][0]
    costs = {
        name: cost
        for name, cost in COSTS.items()
        if any(arm != reference and cost(document, arm) is not None for arm in document["arms"])
    }
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, max(1, len(costs)), figsize=(9, 4.5), sharey=True, squeeze=False
        )
        for axis, (name, cost) in zip(axes[0], costs.items(), strict=False):
            axis.axhline(0, color=GREY, linewidth=1)
            axis.grid(color=GREY, alpha=0.3)
            axis.set_xlabel(f"{name}, {reference} = 1")
            for (family, points), colour, marker in zip(
                _points(document, metric, cost).items(), cycle(COLOURS), cycle(MARKERS)
            ):
                style = {"color": colour, "marker": marker, "capsize": 2, "linewidth": 1}
                if points:
                    axis.errorbar(*zip(*sorted(points), strict=True), label=family, **style)
        unit = "" if is_loss(metric) else ", points"
        axes[0, 0].set_ylabel(f"{metric} less that of {reference}{unit}")
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, frameon=False)
        figure.tight_layout()
        figure.savefig(path, bbox_inches="tight", metadata=METADATA)
        plt.close(figure)
    return path


def _points(
    document: Document, metric: str, cost: Callable[[Document, str], float | None]
) -> dict[str, list[tuple[float, float, float]]]:
    """Cost, difference and half of its interval of each arm, by family."""
    scale, families = 1 if is_loss(metric) else 100, {}
    for arm, said in document["arms"].items():
        gap = difference(document, arm, document["references"][0], metric)
        points = families.setdefault(said["family"], [])
        if gap is not None and (at := cost(document, arm)) is not None:
            points.append((at, scale * gap.mean, scale * (gap.half or 0)))
    return families
