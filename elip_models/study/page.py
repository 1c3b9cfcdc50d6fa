"""A study in Markdown, from its results alone: tables, a chart, and sentences that intervals write.

Recalls and shares are in percent, losses as they are. No sentence says more than its interval.
"""

from collections import defaultdict
from collections.abc import Sequence

from elip_models.study.results import (
    LEVEL,
    Document,
    Interval,
    by_seed,
    difference,
    relative_cost,
    relative_time,
)
from elip_models.validation import ConfigError

NONE = "–"
VALUE = 5  # the column of `table` whose name is the metric's


def page(document: Document, chart: str) -> str:
    """The section of one study; `chart` is the link to its picture."""
    seeds = sorted({run["seed"] for run in document["runs"]})
    parts = [
        f"## {document['question']}",
        f"The paper: {document['paper']}",
        f"`elip study {document['study']}`: {len(document['runs'])} runs of "
        f"`{document['recipe']}`, seeds {', '.join(map(str, seeds))}; {_origins(document)}.",
    ]
    if document["overrides"]:
        settings = ", ".join(f"`{key}={value}`" for key, value in document["overrides"].items())
        parts.append(f"Every arm with {settings}.")
    parts += [_markdown(*table(document, metric)) for metric in document["quality"]]
    parts.append(f"![{document['study']}]({chart})")
    parts += [sentences(document, metric) for metric in document["quality"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(document: Document, metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: an arm's cost, its loss at the end, the metric, its distance to each
    reference.

    Raises:
        ConfigError: a metric that no run has.
    """
    known = sorted({name for run in document["runs"] for name in run["metrics"]})
    if known and metric not in known:
        raise ConfigError(f"quality: expected metrics of {', '.join(known)}, got {metric!r}")
    references = document["references"]
    header = ["arm", "seeds", "FLOPs", "time", "loss at the end", _title(metric)]
    header += [f"against `{reference}`" for reference in references]
    rows = []
    for arm in document["arms"]:
        values = by_seed(document, arm, metric)
        if values:
            cells = [f"`{arm}`", str(len(values)), _ratio(relative_cost(document, arm))]
            cells += [_ratio(relative_time(document, arm)), _mean(document, arm, "loss")]
            cells.append(_mean(document, arm, metric))
            gaps = (difference(document, arm, each, metric) for each in references if each != arm)
            found = dict(zip([each for each in references if each != arm], gaps, strict=True))
            rows.append([*cells, *(shown(found.get(each), metric) for each in references)])
    return header, rows


def sentences(document: Document, metric: str) -> str:
    """Which arms are above, below or not told from each reference."""
    lines = []
    for reference in document["references"]:
        sides: dict[str, list[str]] = defaultdict(list)
        for arm in document["arms"]:
            gap = None if arm == reference else difference(document, arm, reference, metric)
            if gap is not None:
                sides[gap.verdict].append(f"`{arm}` ({shown(gap, metric)})")
        said = [f"**{side}**: {', '.join(arms)}" for side, arms in sorted(sides.items())]
        if said:
            lines.append(f"{_title(metric)} against `{reference}`: {'; '.join(said)}.")
    return "\n\n".join(lines)


def is_loss(metric: str) -> bool:
    """A loss is shown as it is, and lower is better; all else is a share."""
    return metric.rpartition(".")[2].startswith("loss") or metric.endswith("loss")


def _title(metric: str) -> str:
    return f"{metric} (lower is better)" if is_loss(metric) else f"{metric}, %"


def _number(value: float, metric: str) -> str:
    return f"{value:.3f}" if is_loss(metric) else f"{100 * value:.1f}"


def _mean(document: Document, arm: str, metric: str) -> str:
    values = list(by_seed(document, arm, metric).values())
    if not values:
        return NONE
    found = Interval.of(values)
    half = "" if found.half is None else f" ± {_number(found.half, metric)}"
    return _number(found.mean, metric) + half


def shown(gap: Interval | None, metric: str) -> str:
    """A difference and half its interval, in the unit of the metric."""
    if gap is None:
        return NONE
    sign = "+" if gap.mean >= 0 else "−"
    half = "" if gap.half is None else f" ± {_number(gap.half, metric)}"
    return f"{sign}{_number(abs(gap.mean), metric)}{half}"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _origins(document: Document) -> str:
    """Devices, versions and commits of the runs."""
    runs = document["runs"]
    torch = sorted({f"torch {run['measured_on']['torch']}" for run in runs})
    devices = sorted({run["measured_on"]["device"] for run in runs})
    commits = sorted({run["commit"].get("id", "unknown")[:7] for run in runs})
    return f"{', '.join([*devices, *torch])}, commit {', '.join(commits)}"


INTERVALS = (
    f"± is half of the {LEVEL:.0%} interval of the mean over seeds (Student's t), one comparison "
    "at a time; differences are taken seed by seed, as arms of one seed share initialisation and "
    "data, between runs that begin with the same model. Three seeds agree by luck now and then: no "
    "interval of a difference is shorter than the standard deviation makes it which all arms that "
    "train have together; of those that do not, a family of several, or all others. FLOPs: of "
    "training the image tower, scorer included, against the first reference; of an arm that begins "
    "with another model than that, of one step; of an arm that does not train, of a forward. Time: "
    "of training, by steps that take turns with the dense model's."
)
