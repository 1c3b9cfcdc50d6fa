"""A study in Markdown, from its results alone: the means of its arms, their differences from each
reference, and a chart. Recalls and shares are in percent, losses as they are.
"""

from benchmarks.studies.results import (
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
Table = tuple[list[str], list[list[str]]]  # header, and rows


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
    parts += [_markdown(means(document)), f"![{document['study']}]({chart})"]
    for reference in document["references"]:
        parts += [f"Less `{reference}`, seed by seed:", _markdown(differences(document, reference))]
    return "\n\n".join(parts) + "\n"


def means(document: Document) -> Table:
    """Header and rows: an arm's cost, its loss at the end, and each metric of `quality`.

    Raises:
        ConfigError: a metric that no run has.
    """
    known = sorted({name for run in document["runs"] for name in run["metrics"]})
    for metric in document["quality"]:
        if known and metric not in known:
            raise ConfigError(f"quality: expected metrics of {', '.join(known)}, got {metric!r}")
    header = ["arm", "seeds", "FLOPs", "time", "loss at the end"]
    header += map(title, document["quality"])
    rows = []
    for arm in document["arms"]:
        seeds = {run["seed"] for run in document["runs"] if run["arm"] == arm}
        if seeds:
            cells = [f"`{arm}`", str(len(seeds)), _ratio(relative_cost(document, arm))]
            cells += [_ratio(relative_time(document, arm)), _mean(document, arm, "loss")]
            rows.append([*cells, *(_mean(document, arm, each) for each in document["quality"])])
    return header, rows


def differences(document: Document, reference: str) -> Table:
    """Header and rows: by each metric of `quality`, an arm less the reference, in bold where the
    interval leaves zero out."""
    header, rows = ["arm", *map(title, document["quality"])], []
    for arm in document["arms"]:
        gaps = [
            (difference(document, arm, reference, metric), metric)
            for metric in document["quality"]
            if arm != reference
        ]
        if any(gap for gap, _ in gaps):
            rows.append([f"`{arm}`", *(shown(gap, metric) for gap, metric in gaps)])
    return header, rows


def is_loss(metric: str) -> bool:
    """A loss is shown as it is, and lower is better; all else is a share."""
    return metric.rpartition(".")[2].startswith("loss") or metric.endswith("loss")


def title(metric: str) -> str:
    """The name of its column."""
    return metric if is_loss(metric) else f"{metric}, %"


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
    """A difference and half its interval, in the unit of the metric; in bold where it is told."""
    if gap is None:
        return NONE
    sign = "+" if gap.mean >= 0 else "−"
    half = "" if gap.half is None else f" ± {_number(gap.half, metric)}"
    cell = f"{sign}{_number(abs(gap.mean), metric)}{half}"
    return f"**{cell}**" if gap.verdict in ("above", "below") else cell


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _markdown(table: Table) -> str:
    header, rows = table
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _origins(document: Document) -> str:
    """Devices, versions and commits of the runs."""
    runs = document["runs"]
    torch = sorted({f"torch {run['measured_on']['torch']}" for run in runs})
    devices = sorted({run["measured_on"]["device"] for run in runs})
    commits = sorted({run["commit"].get("id", "unknown")[:7] for run in runs})
    return f"{', '.join([*devices, *torch])}, commit {', '.join(commits)}"


INTERVALS = f"""How to read the tables:

- **±** is half of the {LEVEL:.0%} interval of the mean over seeds (Student's t), one comparison at
  a time. A single seed has none.
- **Differences** are taken seed by seed, as arms of one seed share initialisation and data, between
  runs that begin with the same model. Bold: the interval leaves zero out. Of a loss, less is
  better.
- **No short intervals by luck**: three seeds agree by chance now and then, so the interval of a
  difference is at least as long as the standard deviation makes it that all arms which train have
  together; of arms that only measure, those of one family at several shares, or all others. Arms
  whose variance Cochran's test (1%) tells from the others' are left out of that.
- **FLOPs** are those of training the image tower, scorer included, against the first reference; of
  an arm that begins with another model than that, of one step; of an arm that does not train, of a
  forward. **Time** is that of training, by steps that take turns with the dense model's."""
