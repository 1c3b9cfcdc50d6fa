"""The report of a calibration as HTML and as Markdown, in the words of a practitioner.

A change is the reduced measure minus the dense one, in points: hundredths of the measure.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from elip_models.calibration import chart
from elip_models.calibration.choice import is_within
from elip_models.intervals import RESAMPLES, Interval

if TYPE_CHECKING:
    from elip_models.calibration.results import Results, Setting


NOT_CHOSEN = {
    "tried": "Not confirmed:",
    "control": "The control",
    "distilled": "After training,",
}
"""How the sentence on a setting that was not chosen begins, by its role."""


class Row(NamedTuple):
    """A line of the table."""

    role: str
    cells: list[str]


def html(results: "Results") -> str:
    """Return one HTML file that needs no other."""
    return _rendered("report.html.j2", results)


def markdown(results: "Results") -> str:
    """Return the same facts as Markdown."""
    return _rendered("report.md.j2", results)


def _rendered(template: str, results: "Results") -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _with_code, "base64": _base64, "plain": _plain_markdown}
    return environment.get_template(template).render(
        results=results,
        meaning=meaning(results),
        columns=columns(results, results.measures),
        rows=rows(results, results.measures),
        legend=legend(results),
        method=method(results),
        chart=chart.change_against_cost(results),
        shapes=chart.SHAPES,
        size=chart,
        cost=cost_name(results),
        points=points,
        dense={name: interval(score) for name, score in results.dense.items()},
    )


def number(share: float) -> str:
    """Return a share in points: "0.4", or "0.04" where one digit would be 0."""
    text = f"{100 * share:.1f}"
    if float(text) == 0:
        text = f"{100 * share:.2f}"
    return "0.0" if float(text) == 0 else text


def points(share: float) -> str:
    """Return a share as "1 point" or "0.5 points"."""
    return f"{100 * share:g} point{'' if share == 0.01 else 's'}"


def interval(shares: Interval) -> str:
    """Return "0.4 (-0.3 to 1.1)", in points."""
    return f"{number(shares.mean)} ({number(shares.low)} to {number(shares.high)})"


def change(difference: Interval) -> str:
    """Return "+0.4 (-0.3 to 1.1)", in points."""
    return f"{'+' if difference.mean > 0 else ''}{interval(difference)}"


def cost_name(results: "Results") -> str:
    """Return what the chart calls the cost."""
    if results.cost_key is None:
        return "FLOPs"
    batch_size, _, step = results.cost_key.partition(" ")
    return f"{step} time at batch {batch_size}".strip()


def columns(results: "Results", measures: Sequence[str]) -> list[str]:
    """Return the heads of the table, with the changes of some measures on the images held back."""
    times = [f"time, batch {key}" for key in _time_keys(results)]
    memory = ["memory"] if _has_memory(results) else []
    changes = [f"change of {results.decides}, choosing"]
    changes += [f"change of {name}, held back" for name in measures]
    return ["setting", "role", "FLOPs", "tokens", *times, *memory, *changes, "within"]


def rows(results: "Results", measures: Sequence[str]) -> list[Row]:
    """Return the lines of the table, below the dense model.

    Settings that were measured on the images held back come first. Both kinds of settings go from
    the slowest to the fastest.
    """

    def position(setting: "Setting") -> tuple[bool, float]:
        cost = results.cost(setting)
        return setting.held_back is None, -(setting.flops if cost is None else cost)

    keys, has_memory = _time_keys(results), _has_memory(results)
    costs, changes = ["1.00"] * (2 + len(keys) + has_memory), ["0"] * (1 + len(measures))
    lines = [Row("dense", ["dense", "", *costs, *changes, ""])]
    for setting in sorted(results.settings, key=position):
        held_back = setting.held_back or {}
        cells = [setting.name, "" if setting.role == "tried" else setting.role]
        cells += [f"{setting.flops:.2f}", f"{setting.kept:.2f}"]
        cells += [_share(setting.time.get(key)) for key in keys]
        cells += [_share(setting.memory)] if has_memory else []
        cells.append(change(setting.differences[results.decides]))
        cells += [change(held_back[name]) if name in held_back else "" for name in measures]
        gap = chart.shown_difference(results, setting)
        cells.append("yes" if is_within(gap, results.tolerance) else "no")
        lines.append(Row(setting.role, cells))
    return lines


def legend(results: "Results") -> dict[str, str]:
    """Return what each role in the chart is, with the names of its settings."""
    by_role: dict[str, list[str]] = {"dense": []}
    for setting in results.settings:
        if results.cost(setting) is not None:
            by_role.setdefault(setting.role, []).append(setting.name)
    words = {"dense": "dense", "tried": "tried"}
    words["distilled"] = ", ".join(by_role.get("distilled", ()))
    return {
        role: words.get(role) or f"{role}: {', '.join(by_role[role])}"
        for role in chart.SHAPES
        if role in by_role
    }


def meaning(results: "Results") -> list[str]:
    """Return what the result means for a user, one paragraph a thought."""
    tolerance, chosen, decides = points(results.tolerance), results.chosen, results.decides
    said = []
    if results.usable:
        lower = number(chosen.held_back[decides].low)
        said += [
            'You can use this setting: `elip_models.reduce_(model, "best.json")`.',
            f"The lower end of the interval, {lower} points, is above the limit, -{tolerance}. A "
            f"setting that loses {tolerance} or more passes this test with a probability of at "
            "most 2.5%.",
        ]
    elif chosen is not None and not results.saves_time:
        said.append(
            "Use the dense model, larger batches or another machine, or accept a larger loss than "
            f"{tolerance}. `best.json` was not written."
        )
    elif chosen is not None:
        said.append(
            "Do not rely on this setting yet. On the images that chose it, it changed "
            f"{decides} by {change(chosen.differences[decides])} points, which is within "
            f"{tolerance}. "
            "The best of many settings is often a lucky one, so only the images held back count. "
            "`best.json` was not written."
        )
    else:
        said.append(
            f"Use the dense model, add images, or accept a larger loss than {tolerance}. "
            "`best.json` was not written."
        )
    for setting in results.settings:
        if setting.held_back is None or setting.role not in NOT_CHOSEN:
            continue
        gap, cost = setting.held_back[decides], results.cost(setting)
        if setting.role == "tried" and is_within(gap, results.tolerance):
            continue
        where = "" if cost is None else f" at {cost:.2f} of the {cost_name(results)}"
        said.append(
            f"{NOT_CHOSEN[setting.role]} `{setting.name}`{where} changes {decides} by "
            f"{change(gap)} points on the same images held back."
        )
    said.append(
        f"A point is a hundredth of {decides}, and a negative change is a loss. Numbers in "
        "brackets are a 95% confidence interval."
    )
    return said


def method(results: "Results") -> list[str]:
    """Return how the setting was chosen, in ten lines."""
    tolerance, decides = points(results.tolerance), results.decides
    chosen_on, held_back = results.counts["chosen_on"], results.counts["held_back"]
    tried = sum(setting.role in ("tried", "chosen", "control") for setting in results.settings)
    return [
        f"The task is `{results.task}`, and {decides} decides.",
        f"The {chosen_on + held_back} images were split at random: {chosen_on} choose, and "
        f"{held_back} are held back.",
        "If images have classes, both parts have the same share of each class.",
        f"{tried} settings were measured on the images that choose.",
        "Each setting was compared with the dense model image by image.",
        f"A setting is within the tolerance if the lower end of the 95% interval of its change "
        f"is above -{tolerance}.",
        "Settings within the tolerance were timed side by side with the dense model, in "
        "interleaved rounds after a warm-up.",
        "The fastest of them, at most three, were tested on the images held back, the slowest "
        "first, until one was not within the tolerance. The last that was is the choice.",
        "Nothing was fitted on the images held back. Tests in such an order have together the "
        "error rate of one test (Maurer et al. 1995). Control and compared settings were measured "
        "there, too.",
        "Intervals of right or wrong answers are those of Bonett and Price (2012). Others are "
        f"percentile bootstraps over images with {RESAMPLES:,} draws.",
    ]


def _time_keys(results: "Results") -> list[str]:
    keys = {key: None for setting in results.settings for key in setting.time}
    return sorted(keys, key=lambda key: int(key.split()[0]))


def _has_memory(results: "Results") -> bool:
    return any(setting.memory is not None for setting in results.settings)


def _share(value: Interval | float | None) -> str:
    if isinstance(value, Interval):
        return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"
    return "" if value is None else f"{value:.2f}"


def _with_code(text: str) -> Markup:
    """Return text as HTML, with what is between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _plain_markdown(text: Any) -> str:
    """Return text in which Markdown and HTML have no meaning."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(str(text).split()))
