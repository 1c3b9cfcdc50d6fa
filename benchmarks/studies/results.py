"""The results of a study: one small JSON file, and what it says of each arm.

    {"study": .., "question": .., "paper": .., "recipe": .., "overrides": {..}, "quality": [..],
     "references": [..], "arms": {..}, "runs": [{"arm": .., "seed": .., "metrics": {..}, ..}, ..]}

Arms of one seed share initialisation and data, so differences are taken seed by seed, between runs
that begin with the same model: where an arm that others begin with was trained anew, its children
before and after are not paired. An interval is that of the mean by Student's t: 95% of intervals
made so hold the mean of all seeds. Of three seeds some agree by luck, so that of a difference is no
shorter than the one by the standard deviation that all arms which train have together; of those
that only measure, the arms of one family, at several shares of FLOPs, or all that stand alone. Arms
that spread far more than the others, such as one that diverges, say nothing of these.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev, variance
from typing import Any, NamedTuple

from benchmarks.studies.plan import RUNS, Run, Study
from benchmarks.studies.runner import result_of
from elip_models.models.io.files import write_file
from elip_models.validation import ConfigError, require_extra

with require_extra("benchmarks.studies"):
    from filelock import FileLock
    from scipy.stats import f, t

LEVEL = 0.95
OUTLIER = 0.01  # of Cochran's test
Document = dict[str, Any]
Beginning = float | None
Values = dict[int, dict[Beginning, float]]  # by seed, and by the run that an arm goes back to


class Interval(NamedTuple):
    """A mean over seeds, and half the length of its interval; None with a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float], least: float = 0.0) -> "Interval":
        """Of one value a seed, at least one; half of it is at least `least`."""
        n = len(values)
        if n == 1:
            return cls(values[0], None)
        return cls(fmean(values), max(least, _quantile(n - 1) * stdev(values) / n**0.5))

    @property
    def verdict(self) -> str:
        """Of a difference: which side of zero the whole interval lies on."""
        if self.half is None:
            return "one seed"
        if abs(self.mean) <= self.half:
            return "no difference seen"
        return "above" if self.mean > 0 else "below"


def _quantile(freedom: int) -> float:
    return float(t.ppf((1 + LEVEL) / 2, freedom))


def collect(study: Study) -> Document:
    """All finished runs of a study that there are, of whatever seeds."""
    runs = []
    for arm in study.arms:
        folders = (study.root / arm).glob("*/")
        for seed in sorted(int(folder.name) for folder in folders if folder.name.isdecimal()):
            result = result_of(study, Run(arm, seed))
            if result is not None:
                runs.append(result)
    said = asdict(study)
    return {"study": said.pop("name")} | said | {"runs": runs}


def write_results(study: Study, path: Path) -> Document:
    """Writes `collect`, a line a run, and returns it. Runs that the file has, and whose folder is
    gone, stay there as long as their arm is what it was; beside new ones that begin otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / f"{study.name}.lock"):
        document = json.loads(json.dumps(collect(study)))
        if path.is_file():
            document["runs"] = _with_those_before(document, read_results(path))
        runs = ",\n".join(f"    {json.dumps(run)}" for run in document["runs"])
        text = json.dumps(document | {"runs": "RUNS"}, indent=2)
        write_file(path, (text.replace('"RUNS"', f"[\n{runs}\n  ]") + "\n").encode())
    return document


def _with_those_before(document: Document, before: Document) -> list[dict[str, Any]]:
    """The runs of both, by arm, seed and beginning."""

    def key(run: dict[str, Any]) -> tuple[int, int, float]:
        return arms.index(run["arm"]), run["seed"], run.get("beginning") or 0.0

    arms = list(document["arms"])
    if any(before.get(key) != document[key] for key in ("recipe", "overrides")):
        return document["runs"]
    unchanged = {arm for arm in arms if before["arms"].get(arm) == document["arms"][arm]}
    runs = {key(run): run for run in before["runs"] if run["arm"] in unchanged}
    runs |= {key(run): run for run in document["runs"]}
    return [runs[each] for each in sorted(runs)]


def read_results(path: Path) -> Document:
    """The file that `write_results` wrote.

    Raises:
        ConfigError: no such file.
    """
    if not path.is_file():
        raise ConfigError(f"results: expected a file that `elip study` wrote, got {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def by_seed(document: Document, arm: str, metric: str) -> dict[int, float]:
    """A metric of an arm, or a number of its result such as "loss", by seed; those that have it."""
    values = _values(document, metric).get(arm, {})
    return {seed: fmean(found.values()) for seed, found in values.items()}


def difference(document: Document, arm: str, reference: str, metric: str) -> Interval | None:
    """The arm less the reference, seed by seed; None where they share no seed and beginning."""
    values = _values(document, metric)
    gaps = _gaps(values, arm, reference)
    if not gaps:
        return None
    kind = _kind(document, arm)
    alike = [name for name in values if name != reference and _kind(document, name) == kind]
    several = [found for name in alike if len(found := _gaps(values, name, reference)) > 1]
    return Interval.of(gaps, _pooled(several) / len(gaps) ** 0.5)


def _kind(document: Document, arm: str) -> str:
    """Whose standard deviation is taken to be one: arms that train; of those that do not, a family
    of several, or all that stand alone."""
    arms = document["arms"]
    if arms[arm]["length"]:
        return "trains"
    family = arms[arm]["family"]
    return family if sum(said["family"] == family for said in arms.values()) > 1 else "measures"


def _values(document: Document, metric: str) -> dict[str, Values]:
    """A metric of every arm that has it."""
    found: dict[str, Values] = {}
    for run in document["runs"]:
        value = run["metrics"].get(metric, run.get(metric))
        if value is not None:
            of_seed = found.setdefault(run["arm"], {}).setdefault(run["seed"], {})
            of_seed[run.get("beginning")] = value
    return found


def _gaps(values: dict[str, Values], arm: str, reference: str) -> list[float]:
    """The arm less the reference, one number a seed, of runs that begin alike."""
    ours, theirs = values.get(arm, {}), values.get(reference, {})
    of_seeds = (
        [
            our - their
            for here, our in ours[seed].items()
            for there, their in theirs.get(seed, {}).items()
            if here == there or None in (here, there)
        ]
        for seed in sorted(ours)
    )
    return [fmean(gaps) for gaps in of_seeds if gaps]


def _pooled(several: Sequence[Sequence[float]]) -> float:
    """Half of the interval of one value, by the standard deviation that all share."""
    if not several:
        return 0.0
    shared, freedom = _shared(_alike(several))
    return _quantile(freedom) * shared**0.5


def _alike(several: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Less those whose variance is told from that of all others, the largest first, as ISO 5725-2
    does before it pools: Cochran's test at 1%."""
    alike = sorted(several, key=variance)
    while len(alike) > 2:
        *others, widest = alike
        shared, freedom = _shared(others)
        limit = f.ppf(1 - OUTLIER / len(alike), len(widest) - 1, freedom)
        if variance(widest) <= limit * shared:
            break
        alike = others
    return alike


def _shared(several: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The pooled variance, and its degrees of freedom."""
    freedom = sum(len(gaps) - 1 for gaps in several)
    return sum((len(gaps) - 1) * variance(gaps) for gaps in several) / freedom, freedom


def relative_cost(document: Document, arm: str) -> float | None:
    """FLOPs of the arm's tower against those of the first reference: of training, the whole run, or
    one step where it begins with another model than that; of a forward where it does not train."""
    steps = by_seed(document, arm, "step_flops")
    if not steps:
        return None
    ratio = fmean(steps.values())
    images = by_seed(document, arm, "images")
    reference = document["references"][0]
    if not images or not _begin_alike(document, arm, reference):
        return ratio
    theirs = by_seed(document, reference, "images"), by_seed(document, reference, "step_flops")
    if not all(theirs):
        return ratio
    of_reference = fmean(theirs[0].values()) * fmean(theirs[1].values())
    return ratio * fmean(images.values()) / of_reference


def relative_time(document: Document, arm: str) -> float | None:
    """Training time of the arm against that of the first reference: of a step, each beside the
    dense model's, times the images of the run."""
    reference = document["references"][0]
    ours, theirs = (_dense_images(document, each) for each in (arm, reference))
    known = ours is not None and theirs is not None
    return ours / theirs if known and _begin_alike(document, arm, reference) else None


def _begin_alike(document: Document, arm: str, other: str) -> bool:
    """Both begin at random, or with the same model."""
    arms = document["arms"]
    return arms[arm]["parent"] == arms[other]["parent"]


def _dense_images(document: Document, arm: str) -> float | None:
    """On how many images the dense model trains in the time that a run of the arm takes."""
    times, images = (by_seed(document, arm, key) for key in ("step_time", "images"))
    return median(times.values()) * fmean(images.values()) if times and images else None
