"""One study as a Markdown page: means of its arms, paired differences from each reference, a chart.

Recalls and shares are in percent and their differences in percentage points; losses have no unit.
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
CHART = (
    f"Bars are {LEVEL:.0%} confidence intervals. A change is coloured if its interval excludes "
    "zero. The tables have all arms."
)
HOW_TO_READ = f"""## How to read the tables

An **arm** is one setting that a study compares. All arms of one **seed** begin with the same
weights and see the same batches.

| metric | meaning |
| --- | --- |
| `dense.*` | held-out images encoded without text and with all patches |
| `reduced.*` | held-out images reduced by the arm's strategy, guided by the image alone |
| `r1` | mean of R@1 from image to text and from text to image |
| `top1` | share of images and of texts whose own pair ranks first among 100 pairs |
| `contrastive_loss` | contrastive loss of batches of 100 pairs |
| `objective.*` | training losses on held-out batches, with each image reduced as in training |
| `selection.*` | what the reduction keeps of the patches that the caption names |

- **Mean ± half**: mean over seeds and half of its {LEVEL:.0%} confidence interval (Student's t).
- **Paired difference**: the arm minus the reference, seed by seed, with its {LEVEL:.0%} confidence
  interval in brackets. Runs are paired only if they begin with the same model.
- **Significant** (bold): the interval excludes zero. A lower loss is better. Intervals are not
  corrected for multiple comparisons: one in twenty comparisons of equal arms is significant by
  chance.
- **Shortest interval**: three seeds can agree by chance. An interval is therefore at least as long
  as the one that follows from the pooled standard deviation of all arms that train. Arms that are
  only measured are pooled by family, or with all other such arms. Outliers (Cochran's test at 1%)
  are left out of the pool.
- **FLOPs** are those of training the image tower, scorer included, relative to the first reference.
  For an arm that begins with another model they are those of one training step. For an arm that
  does not train they are those of one forward pass.
- **Time** is training time relative to the first reference. Its steps alternate with steps of the
  dense model in one process.
"""


def study_page(document: Document, chart: str, notes: str) -> str:
    """Return the page of one study.

    Args:
        document: Results of the study.
        chart: Link to its chart.
        notes: Markdown below the title: how to read the tables, or a link to that.
    """
    seeds = sorted({run["seed"] for run in document["runs"]})
    parts = [
        f"# {document['question']}",
        notes,
        f"What the paper reports: {document['paper']}",
        f"Runs: {len(document['runs'])}, with the recipe `{document['recipe']}` and seeds "
        f"{', '.join(map(str, seeds))}. Command: `elip study {document['study']}`. "
        f"Measured on {_origins(document)}.",
    ]
    if document["overrides"]:
        settings = ", ".join(f"`{key}={value}`" for key, value in document["overrides"].items())
        parts.append(f"Settings of every arm: {settings}.")
    alt = f"Change in quality and cost of the main arms of the study {document['study']}"
    parts += [f"![{alt}]({chart})", CHART, "## Means over seeds", markdown(means(document))]
    for reference in document["references"]:
        rows = markdown(differences(document, reference))
        parts += [f"## Paired differences from `{reference}`", rows]
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
    """Return header and rows: for each quality metric, the arm minus the reference."""
    header, rows = ["arm", *map(difference_title, document["quality"])], []
    for arm in document["arms"]:
        gaps = [
            (difference(document, arm, reference, metric), metric)
            for metric in document["quality"]
            if arm != reference
        ]
        if any(gap for gap, _ in gaps):
            rows.append([f"`{arm}`", *(difference_cell(gap, metric) for gap, metric in gaps)])
    return header, rows


def is_loss(metric: str) -> bool:
    """Return True for losses, which have no unit and are better if lower."""
    return metric.rpartition(".")[2].startswith("loss") or metric.endswith("loss")


def title(metric: str) -> str:
    """Return the column title of a metric."""
    return metric if is_loss(metric) else f"{metric}, %"


def difference_title(metric: str) -> str:
    """Return the column title of differences of a metric."""
    return metric if is_loss(metric) else f"{metric}, points"


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
        return f"{cell} (1 seed)"
    low, high = (_number(end, metric) for end in (gap.mean - gap.half, gap.mean + gap.half))
    cell = f"{cell} ({low} to {high})"
    return f"**{cell}**" if gap.is_significant else cell


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def markdown(table: Table, *, left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are left-aligned."""
    header, rows = table
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _origins(document: Document) -> str:
    """Return devices, versions and commits of the runs."""
    runs = document["runs"]
    torch = sorted({f"torch {run['measured_on']['torch']}" for run in runs})
    devices = sorted({run["measured_on"]["device"] for run in runs})
    commits = sorted({run["commit"].get("id", "unknown")[:7] for run in runs})
    return f"{', '.join([*devices, *torch])}, at commit {', '.join(commits)}"
