"""Chart of a calibration: what each setting changes in the features, and how long it takes."""

from pathlib import Path

from elip_models.analysis.calibration import Calibration, Trial
from elip_models.analysis.chart_style import write_figure
from elip_models.analysis.visualize import new_figure

WIDTH, HEIGHT = 7.0, 4.2  # inches
MARKERS = "osD^vP*Xh"


def draw_calibration(found: Calibration, path: Path) -> Path:
    """Draw loss against time, or against FLOPs if nothing was timed, as a PNG or SVG."""
    figure = new_figure(WIDTH, HEIGHT)
    axis = figure.subplots()
    is_timed = all(each.time is not None for each in found.trials)
    by_label: dict[str, list[Trial]] = {}
    for each in sorted(found.trials, key=lambda each: each.flops):
        by_label.setdefault(each.label, []).append(each)
    for marker, (label, trials) in zip(MARKERS, by_label.items(), strict=False):
        cost = [each.time if is_timed else each.flops for each in trials]
        mean = [each.loss.mean for each in trials]
        below = [each.loss.mean - each.loss.low for each in trials]
        above = [each.loss.high - each.loss.mean for each in trials]
        axis.errorbar(cost, mean, yerr=[below, above], marker=marker, label=label, capsize=2)
    axis.axhline(found.tolerance, color="#808080", linestyle="--", label="tolerance")
    if found.chosen is not None:
        cost = found.chosen.time if is_timed else found.chosen.flops
        axis.plot([cost], [found.chosen.loss.mean], "o", ms=14, mfc="none", mec="k", label="chosen")
    axis.set_yscale("log")
    axis.set_xlabel("time relative to dense" if is_timed else "FLOPs relative to dense")
    axis.set_ylabel(f"mean loss ({found.metric})")
    axis.set_title(f"{found.images} images; bars are 95% confidence intervals", fontsize=10)
    axis.legend(fontsize=8)
    write_figure(figure, path, dpi=120)
    return path
