"""Draw the chart of results.md: time against loss, from the results of `benchmarks.real.tasks`.

python docs/readme_chart.py             # write docs/time_against_accuracy.svg
python docs/readme_chart.py --check     # exit status 1 if the file is stale
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import matplotlib

from elip_models.analysis.chart_style import GREY, METADATA, STYLE, write_figure
from elip_models.saving.files import read_object

matplotlib.use("svg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real" / "tasks_test.json"
CHART = DOCS / "time_against_accuracy.svg"
BATCH, THREADS = 8, 2
KEEPS = (0.7, 0.5)
LINES = {
    "merge": ("merge (default)", "#009e73", "o"),
    "resize_merge": ("resize_merge", "#0072b2", "D"),
    "resize": ("smaller image", GREY, "s"),
    "evit": ("EViT", "#e69f00", "^"),
    "random": ("random pruning", "#cc79a7", "v"),
}
"""Strategy: its name in the chart, colour, marker."""
PANELS = {
    "top1": "Classification: top-1 of a linear probe",
    "text_to_image_r5": "Retrieval, text to image: R@5",
}


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the chart."""
    with matplotlib.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(PANELS), figsize=(8.4, 3.3), layout="constrained")
        for axes, (task, title) in zip(panels, PANELS.items(), strict=True):
            _panel(axes, document, task, title)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, frameon=False, loc="outside lower center", ncols=len(LINES))
        write_figure(figure, path, metadata=METADATA)
        plt.close(figure)


def _panel(axes: "Axes", document: dict[str, Any], task: str, title: str) -> None:
    rows = {row["setting"]: row["difference"][task] for row in document["settings"]}
    runs = document["time"]["runs"]
    times = next(run for run in runs if (run["batch"], run["threads"]) == (BATCH, THREADS))
    for strategy, (label, colour, marker) in LINES.items():
        settings = [f"{strategy} {keep}" for keep in KEEPS]
        mean, low, high = (
            [0.0, *(100 * rows[name][end] for name in settings)] for end in ("mean", "low", "high")
        )
        errors = [
            [middle - end for middle, end in zip(mean, low, strict=True)],
            [end - middle for middle, end in zip(mean, high, strict=True)],
        ]
        axes.errorbar(
            [1.0, *(times["ratios"][name] for name in settings)],
            mean,
            errors,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            label=label,
        )
    axes.plot([1.0], [0.0], color=GREY, marker="*", markersize=11, zorder=5)
    axes.annotate("dense", (1.0, 0.0), (0, 7), textcoords="offset points", ha="center")
    axes.set_xlim(0.35, 1.06)
    axes.set_title(title, fontsize=9, color=GREY)
    axes.set_xlabel("time relative to dense")
    axes.set_ylabel("change, points")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.5)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the chart is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    document = read_object(RESULTS)
    if not options.check:
        draw(document, CHART)
        return 0
    with TemporaryDirectory() as folder:
        drawn = Path(folder) / CHART.name
        draw(document, drawn)
        current = CHART.is_file() and drawn.read_bytes() == CHART.read_bytes()
    if not current:
        sys.stderr.write(f"{CHART}: stale; run python docs/readme_chart.py\n")
    return 0 if current else 1


if __name__ == "__main__":
    raise SystemExit(main())
