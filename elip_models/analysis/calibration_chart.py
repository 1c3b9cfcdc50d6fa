"""Chart of a calibration: what each setting changes in the features, and how long it takes."""

from pathlib import Path

from elip_models.analysis.calibration import Calibration, Trial
from elip_models.analysis.chart_style import write_figure
from elip_models.analysis.visualize import new_figure

WIDTH, HEIGHT = 7.0, 4.2  # inches
MARKERS = "osD^vP*Xh"


def draw_calibration(calibration: Calibration, path: Path) -> Path:
    """Draw loss against time, or against FLOPs if nothing was timed, as a PNG or SVG."""
    figure = new_figure(WIDTH, HEIGHT)
    axis = figure.subplots()
    is_timed = all(trial.time is not None for trial in calibration.trials)
    by_label: dict[str, list[Trial]] = {}
    for trial in sorted(calibration.trials, key=lambda trial: trial.flops):
        by_label.setdefault(trial.label, []).append(trial)
    for marker, (label, trials) in zip(MARKERS, by_label.items(), strict=False):
        cost = [trial.time if is_timed else trial.flops for trial in trials]
        mean = [trial.loss.mean for trial in trials]
        below = [trial.loss.mean - trial.loss.low for trial in trials]
        above = [trial.loss.high - trial.loss.mean for trial in trials]
        axis.errorbar(cost, mean, yerr=[below, above], marker=marker, label=label, capsize=2)
    axis.axhline(calibration.tolerance, color="#808080", linestyle="--", label="tolerance")
    if calibration.chosen is not None:
        cost = calibration.chosen.time if is_timed else calibration.chosen.flops
        axis.plot(
            [cost], [calibration.chosen.loss.mean], "o", ms=14, mfc="none", mec="k", label="chosen"
        )
    axis.set_yscale("log")
    axis.set_xlabel("time relative to dense" if is_timed else "FLOPs relative to dense")
    axis.set_ylabel(f"mean loss ({calibration.metric})")
    axis.set_title(f"{calibration.images} images; bars are 95% confidence intervals", fontsize=10)
    axis.legend(fontsize=8)
    write_figure(figure, path, dpi=120)
    return path
