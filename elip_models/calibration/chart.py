"""The chart of a report: what each setting changes against its cost, in units of an SVG image.

`report.html.j2` draws it. Losses that are far beyond the tolerance are drawn at the lower edge, so
that the differences that decide stay visible.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from elip_models.intervals import Interval

if TYPE_CHECKING:
    from elip_models.calibration.results import Results, Setting

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 24, 40  # margins
LABEL_SPACE = 0.13  # above the highest interval, of the height
SHAPES = {  # SVG paths around 0, 0, by role
    "dense": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "tried": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "chosen": "M-8,0a8,8 0 1,0 16,0a8,8 0 1,0 -16,0z",
    "control": "M-6,-6h12v12h-12z",
    "compared": "M0,-8L8,0L0,8L-8,0z",
    "distilled": "M0,-8L8,6H-8z",
}
BEYOND = 4
"""The lower edge of the chart, in tolerances, unless a setting needs more that is not just tried
or a control."""


class Mark(NamedTuple):
    """A setting in the chart.

    Attributes:
        x, y: of the change.
        low, high: y of the ends of its interval.
        role: that of the setting.
        label: is drawn beside it, for dense and the choice; "" for others.
        title: is shown under the pointer.
        is_beyond: the change is below the chart.
    """

    x: float
    y: float
    low: float
    high: float
    role: str
    label: str
    title: str
    is_beyond: bool


class Tick(NamedTuple):
    """A labelled line of an axis."""

    at: float
    text: str


class Chart(NamedTuple):
    """Marks and axes; `left_out` settings have no cost, `beyond` ones are below the chart."""

    marks: list[Mark]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    tolerance: float
    left_out: int
    beyond: int


def shown_difference(results: "Results", setting: "Setting") -> Interval:
    """Return the difference on the images held back, or on the others if there is none."""
    return (setting.held_back or setting.differences)[results.decides]


def change_against_cost(results: "Results") -> Chart:
    """Return the chart of all settings that have a cost."""
    costs = [(results.cost(setting), setting) for setting in results.settings]
    points = [
        (cost, shown_difference(results, setting).mean, setting)
        for cost, setting in costs
        if cost is not None
    ]
    left = math.floor(20 * min((cost for cost, *_ in points), default=0.9) - 0.5) / 20
    right = max(1.03, *(cost + 0.03 for cost, *_ in points), 1.03)
    apart = [change for _, change, setting in points if setting.role not in ("tried", "control")]
    lower = min(-BEYOND * results.tolerance, *(1.2 * change for change in apart), 0)
    ends = [shown_difference(results, setting).high for *_, setting in points]
    upper = min(-lower / 2, max(0.5 * results.tolerance, *ends, 0))
    upper += LABEL_SPACE * (upper - lower)

    def x_of(cost: float) -> float:
        return round(LEFT + (cost - left) / (right - left) * (WIDTH - LEFT - RIGHT), 1)

    def y_of(change: float) -> float:
        share = (min(max(change, lower), upper) - lower) / (upper - lower)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    marks = [Mark(x_of(1), y_of(0), y_of(0), y_of(0), "dense", "dense", "dense", False)]
    for cost, change, setting in sorted(points, key=lambda point: point[2].role != "tried"):
        gap = shown_difference(results, setting)
        marks.append(
            Mark(
                x_of(cost),
                y_of(change),
                y_of(gap.low),
                y_of(gap.high),
                setting.role,
                setting.name if setting.role == "chosen" else "",
                f"{setting.name}: {100 * change:+.1f} points at {cost:.2f}",
                change < lower,
            )
        )
    return Chart(
        marks,
        [Tick(x_of(value), f"{value:.2g}") for value in _ticks(left, right, 6)],
        [Tick(y_of(value), f"{100 * value:g}") for value in _ticks(lower, upper, 6)],
        y_of(-results.tolerance),
        len(costs) - len(points),
        sum(mark.is_beyond for mark in marks),
    )


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers in an interval, at most `count` + 1."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]
