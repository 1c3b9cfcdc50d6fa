"""Draw the chart of the README: time against loss on the panel of labelled sets and on CamVid.

python docs/readme_chart.py             # write docs/time_against_accuracy.svg
python docs/readme_chart.py --check     # exit status 1 if the file is stale
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import matplotlib

from benchmarks.real import panel_tables
from benchmarks.real.measures import TOP1
from elip_models.analysis.chart_style import GREY, METADATA, STYLE, write_figure
from elip_models.intervals import Interval
from elip_models.saving.files import read_object

matplotlib.use("svg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "real"
CHART = DOCS / "time_against_accuracy.svg"
MASKS = "merge:reach=6,decrease=0.5 0.55"
"""The only setting with options in the chart: chosen on the validation frames of CamVid."""
LINES = {
    "merge": ("merge", "#009e73", "o"),
    "merge:": (MASKS, "#009e73", "*"),
    "tome": ("tome", "#56b4e9", "P"),
    "resize_merge": ("resize_merge", "#0072b2", "D"),
    "resize": ("smaller image", GREY, "s"),
    "dense": ("smaller image", GREY, "s"),
    "distilled_resize_merge": ("resize_merge, distilled", "#d55e00", "D"),
    "distilled_resize": ("smaller image, distilled", "#d55e00", "s"),
    "evit": ("EViT", "#e69f00", "^"),
    "random": ("random pruning", "#cc79a7", "v"),
}
"""Name of the strategy in a setting: its name in the chart, colour, marker."""
LOWEST = -9.0
"""Points of change at the lower end of a panel; an arrow and a number stand for worse means."""
Points = dict[str, list[tuple[float, Interval]]]
"""Time and difference of the settings of each strategy."""


def draw(panel: dict[str, Any], camvid: dict[str, Any], path: Path) -> None:
    """Write the chart."""
    rows = panel_tables.rows(panel, TOP1)
    on_camvid = {
        entry["setting"]: Interval(*entry["difference"]["dense"].values())
        for entry in camvid["settings"]
        if entry["setting"] == MASKS or not entry["setting"].startswith("merge:")
    }
    panels = {
        f"Mean of {len(panel['sets'])} labelled data sets": by_strategy(
            panel, {row.setting: row.mean for row in rows}
        ),
        "Worst data set of each setting": by_strategy(
            panel, {row.setting: row.sets[row.worst] for row in rows}
        ),
        "Segmentation (CamVid)": by_strategy(camvid, on_camvid),
    }
    with matplotlib.rc_context(STYLE | {"font.size": 10.5}):
        size = (10.4, 4.0)
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
        for each, (title, points) in zip(axes, panels.items(), strict=True):
            _panel(each, points, title)
        axes[0].set_ylabel("top-1, head kept: points of change")
        axes[2].set_ylabel("mIoU, head kept: points of change")
        handles = {}
        for each in axes:
            handles |= zip(*reversed(each.get_legend_handles_labels()), strict=True)
        place = {"frameon": False, "loc": "outside lower center", "ncols": 5}
        figure.legend(handles.values(), handles, **place)
        write_figure(figure, path, metadata=METADATA)
        plt.close(figure)


def by_strategy(document: dict[str, Any], differences: dict[str, Interval]) -> Points:
    """Return what was measured with a time, by strategy; `merge 0.7@294` is a resize_merge."""
    times, found = panel_tables.times(document, panel_tables.BATCH), defaultdict(list)
    for setting, difference in differences.items():
        strategy = re.match("merge:|[a-z_]+", setting)[0]
        if "@" in setting and strategy != "dense":
            strategy = "resize_merge"
        found[strategy].append((times[setting].mean, difference))
    return found


def _panel(axes: "Axes", points: Points, title: str) -> None:
    for strategy, found in points.items():
        label, colour, marker = LINES[strategy]
        shown = [(time, gap) for time, gap in found if 100 * gap.mean > LOWEST]
        style = {"color": colour, "marker": marker, "markersize": 6, "label": label}
        widths = {"linestyle": "none", "elinewidth": 0.8, "capsize": 2}
        time = [each for each, _ in shown]
        mean = [100 * gap.mean for _, gap in shown]
        below = [100 * (gap.mean - gap.low) for _, gap in shown]
        above = [100 * (gap.high - gap.mean) for _, gap in shown]
        axes.errorbar(time, mean, [below, above], **style, **widths)
        for at, gap in found:
            if 100 * gap.mean <= LOWEST:
                text = f"{100 * gap.mean:.1f}".replace("-", "\N{MINUS SIGN}")
                arrow = {"arrowstyle": "->", "color": colour}
                ends = {"xytext": (at + 0.01, LOWEST + 0.8), "ha": "left", "color": colour}
                axes.annotate(text, (at, LOWEST), arrowprops=arrow, **ends)
    axes.plot([1.0], [0.0], color=GREY, marker="*", markersize=11, zorder=5)
    axes.annotate("dense", (1.0, 0.0), (0, 7), textcoords="offset points", ha="center")
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.set_xlim(0.37, 1.06)
    axes.set_ylim(LOWEST, 2.0)
    axes.set_title(title, fontsize=11, color=GREY, pad=10)
    axes.set_xlabel("time relative to dense, batch 8")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.5)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the chart is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    panel, camvid = (read_object(RESULTS / f"{name}.json") for name in ("panel", "camvid"))
    if not options.check:
        draw(panel, camvid, CHART)
        return 0
    with TemporaryDirectory() as folder:
        drawn = Path(folder) / CHART.name
        draw(panel, camvid, drawn)
        current = CHART.is_file() and drawn.read_bytes() == CHART.read_bytes()
    if not current:
        sys.stderr.write(f"{CHART}: stale; run python docs/readme_chart.py\n")
    return 0 if current else 1


if __name__ == "__main__":
    raise SystemExit(main())
