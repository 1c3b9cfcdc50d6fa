"""One study as a Markdown page: means of its arms, paired differences from each reference.

Recalls and shares are in percent and their differences in percentage points; losses have no unit.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.studies.analysis import POWER, against, bounds, margin
from benchmarks.studies.results import (
    Document,
    Interval,
    by_seed,
    is_loss,
    relative_cost,
    relative_time,
)
from benchmarks.tables import table
from elip_models.validation import ConfigError

NONE = "–"
Table = tuple[list[str], list[list[str]]]  # header, and rows
HOW_TO_READ = "`docs/run_a_study.md` in the repository explains how to read the tables."


def study_page(document: Document) -> str:
    """Return the page of one study."""
    seeds = sorted({run["seed"] for run in document["runs"]})
    parts = [
        f"# {document['question']}",
        HOW_TO_READ,
        f"What the ELIP paper reports: {document['paper']}",
        f"Runs: {len(document['runs'])}, with the recipe `{document['recipe']}` and seeds "
        f"{', '.join(map(str, seeds))}. Command: "
        f"`python -m benchmarks.studies {document['study']}`. "
        f"Measured on {_origins(document)}. {_uncommitted(document)}",
    ]
    if document["overrides"]:
        settings = ", ".join(f"`{key}={value}`" for key, value in document["overrides"].items())
        parts.append(f"Settings of every arm: {settings}.")
    parts += ["## Means over seeds", table(*means(document), left=1)]
    for reference in document["references"]:
        columns, notes = differences(document, reference)
        title = f"## Paired differences from `{reference}`"
        parts += [title, table(*columns, left=1), " ".join(notes)]
    return "\n\n".join(parts) + "\n"


def means(document: Document) -> Table:
    """Return header and rows: cost of each arm, its final training loss and each quality metric.

    Raises:
        ConfigError: a metric that no run has.
    """
    known = sorted({name for run in document["runs"] for name in run["metrics"]})
    for metric in document["quality"]:
        if known and metric not in known:
            raise ConfigError(f"quality: expected metrics of {', '.join(known)}, got {metric!r}")
    header = ["arm", "seeds", "FLOPs", "time", "final training loss"]
    header += [title(metric, "%") for metric in document["quality"]]
    rows = []
    for arm in document["arms"]:
        seeds = {run["seed"] for run in document["runs"] if run["arm"] == arm}
        if seeds:
            cells = [f"`{arm}`", str(len(seeds)), _ratio(relative_cost(document, arm))]
            cells += [_ratio(relative_time(document, arm)), _mean(document, arm, "loss")]
            rows.append([*cells, *(_mean(document, arm, each) for each in document["quality"])])
    return header, rows


def differences(document: Document, reference: str) -> tuple[Table, list[str]]:
    """Return header and rows, for each quality metric the arm minus the reference, and notes."""
    metrics = document["quality"]
    found = against(document, reference, metrics)
    header, rows = ["arm", *(title(metric, "points") for metric in metrics)], []
    for arm in document["arms"]:
        gaps = [(found.get((arm, metric)), metric) for metric in metrics]
        if any(gap for gap, _ in gaps):
            rows.append([f"`{arm}`", *(difference_cell(gap, metric) for gap, metric in gaps)])
    notes = [power(found), *equivalent(document, reference, metrics)] if rows else []
    return (header, rows), notes


def power(found: Mapping[tuple[str, str], Interval]) -> str:
    """Return the minimal detectable effect of each metric."""
    effects: dict[str, list[float]] = {}
    for (_, metric), gap in found.items():
        if gap.detectable is not None:
            effects.setdefault(metric, []).append(gap.detectable)
    if not effects:
        return "No test with one seed."
    medians = {metric: _number(median(values), metric) for metric, values in effects.items()}
    units = {metric: "" if is_loss(metric) else " points" for metric in medians}
    shown = ", ".join(f"{metric} {value}{units[metric]}" for metric, value in medians.items())
    return f"Minimal detectable effect ({POWER:.0%} power, median of the arms): {shown}."


def equivalent(document: Document, reference: str, metrics: Sequence[str]) -> list[str]:
    """Return a sentence for each loss with a margin: the equivalent arms and their bounds."""
    sentences = []
    for metric in metrics:
        limit = margin(document, reference, metric)
        if limit is None:
            continue
        shown = [
            f"`{arm}` (at most {bound:.3f})"
            for arm, bound in bounds(document, reference, metric).items()
            if bound < limit
        ]
        sentences.append(
            f"Equivalent to `{reference}` in {metric} within {limit:.3f}, the deficit of "
            f"`{document['margin']}`: {', '.join(shown) or 'no arm'}."
        )
    return sentences


def title(metric: str, unit: str) -> str:
    """Return the column title of a metric; losses have no unit."""
    return metric if is_loss(metric) else f"{metric}, {unit}"


def _number(value: float, metric: str) -> str:
    digits = f"{value:z.3f}" if is_loss(metric) else f"{100 * value:z.1f}"
    return digits.replace("-", "−")


def _mean(document: Document, arm: str, metric: str) -> str:
    values = list(by_seed(document, arm, metric).values())
    if not values:
        return NONE
    found = Interval.of(values)
    half = "" if found.half is None else f" ± {_number(found.half, metric)}"
    return _number(found.mean, metric) + half


def difference_cell(gap: Interval | None, metric: str) -> str:
    """Return a difference with its interval, in the unit of the metric; in bold if significant."""
    if gap is None:
        return NONE
    mean = _number(gap.mean, metric)
    cell = mean if mean.startswith("−") else f"+{mean}"
    if gap.half is None:
        return f"{cell} ({'1 seed' if gap.seeds == 1 else 'equal in all seeds'})"
    low, high = (_number(end, metric) for end in (gap.mean - gap.half, gap.mean + gap.half))
    cell = f"{cell} ({low} to {high})"
    return f"**{cell}**" if gap.is_significant else cell


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _origins(document: Document) -> str:
    """Return devices, versions and commits of the runs."""
    runs = document["runs"]
    torch = sorted({f"torch {run['measured_on']['torch']}" for run in runs})
    devices = sorted({run["measured_on"]["device"] for run in runs})
    commits = sorted({run["commit"].get("id", "unknown")[:7] for run in runs})
    return f"{', '.join([*devices, *torch])}, at commit {', '.join(commits)}"


def _uncommitted(document: Document) -> str:
    """Return how many runs are from trees with uncommitted changes, or from unknown commits."""
    runs = document["runs"]
    dirty = sum(run["commit"].get("dirty", False) for run in runs)
    unknown = sum("id" not in run["commit"] for run in runs)
    text = f"{dirty or 'None'} of the runs {'is' if dirty == 1 else 'are'} from trees with "
    text += "uncommitted changes, so their commit does not have all of their code."
    text = text if dirty else text.partition(", so")[0] + "."
    return f"{text} Runs without a commit: {unknown}." if unknown else text
