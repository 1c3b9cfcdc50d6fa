"""Results of a study: one small JSON file, and the statistics that are computed from it.

    {"study": .., "question": .., "paper": .., "recipe": .., "overrides": {..}, "quality": [..],
     "references": [..], "arms": {..}, "runs": [{"arm": .., "seed": .., "metrics": {..}, ..}, ..]}

Arms of one seed share initialisation and data, so differences are paired by seed. Runs are paired
only if they begin with the same model: after a parent arm is trained again, its old and new
children are not paired. Intervals are 95% confidence intervals of the mean (Student's t). Three
seeds can agree by chance, so the interval of a difference is at least as long as the one that
follows from a pooled standard deviation. Arms that train are pooled. Arms that are only measured
are pooled by family, or with all other such arms. Outliers, such as an arm that diverges, are left
out of the pool.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev, variance
from typing import Any, NamedTuple

from benchmarks.studies.plan import RUNS, Run, Study
from benchmarks.studies.runner import result_of
from elip_models.models.io.files import read_object, write_file
from elip_models.validation import (
    ConfigError,
    as_config_error,
    mismatch_error,
    require_extra,
    shortened,
)

with require_extra("benchmarks.studies"):
    from filelock import FileLock
    from scipy.stats import f, t

LEVEL = 0.95
OUTLIER = 0.01  # significance level of Cochran's test
Document = dict[str, Any]
OF_STUDY = {
    **dict.fromkeys(("study", "question", "paper", "recipe"), str),
    **dict.fromkeys(("overrides", "arms"), dict[str, Any]),
    **dict.fromkeys(("quality", "references", "runs"), list),
}
OF_ARM = {"family": str, "parent": str | None, "length": float}
OF_RUN = {
    **{"arm": str, "seed": int, "metrics": dict[str, float]},
    **dict.fromkeys(("measured_on", "commit"), dict[str, Any]),
}
Beginning = float | None
Values = dict[int, dict[Beginning, float]]  # by seed, and by the model that the run begins with


class Interval(NamedTuple):
    """Mean over seeds, half of its confidence interval (None for one seed), and number of seeds."""

    mean: float
    half: float | None
    seeds: int = 1

    @classmethod
    def of(cls, values: Sequence[float], least: float = 0.0) -> "Interval":
        """Return the interval of one value per seed; `half` is at least `least`."""
        n = len(values)
        if n == 1:
            return cls(values[0], None)
        return cls(fmean(values), max(least, _quantile(n - 1) * stdev(values) / n**0.5), n)

    @property
    def verdict(self) -> str:
        """Return on which side of zero the whole interval of a difference is."""
        if self.half is None:
            return "one seed"
        if abs(self.mean) <= self.half:
            return "not significant"
        return "above" if self.mean > 0 else "below"

    @property
    def is_significant(self) -> bool:
        """Return True if the interval excludes zero."""
        return self.verdict in ("above", "below")


def _quantile(freedom: int) -> float:
    return float(t.ppf((1 + LEVEL) / 2, freedom))


def collect(study: Study) -> Document:
    """Return all finished runs of a study, of any seed."""
    runs = []
    for arm in study.arms:
        folders = (study.root / arm).glob("*/")
        for seed in sorted(int(folder.name) for folder in folders if folder.name.isdecimal()):
            result = result_of(study, Run(arm, seed))
            if result is not None:
                runs.append(result)
    settings = asdict(study)
    return {"study": settings.pop("name")} | settings | {"runs": runs}


def write_results(study: Study, path: Path) -> Document:
    """Write the document of `collect`, one line per run, and return it.

    Runs of the existing file stay in it, also without their folder, if their arm has not changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / f"{study.name}.lock"):
        document = json.loads(json.dumps(collect(study)))
        if path.is_file():
            document["runs"] = _merge_earlier_runs(document, read_results(path))
        runs = ",\n".join(f"    {json.dumps(run)}" for run in document["runs"])
        text = json.dumps(document | {"runs": "RUNS"}, indent=2)
        write_file(path, (text.replace('"RUNS"', f"[\n{runs}\n  ]") + "\n").encode())
    return document


def _merge_earlier_runs(document: Document, before: Document) -> list[dict[str, Any]]:
    """Return the runs of both documents, sorted by arm, seed and beginning."""

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
    """Return the document that `write_results` wrote.

    Raises:
        ConfigError: no such file, or one of another form.
    """
    expected = "expected a file that `elip study` wrote, got"
    if not path.is_file():
        raise ConfigError(f"results: {expected} {path}")
    with as_config_error("results"):
        document = read_object(path)
    parts = [(document, OF_STUDY)]
    if _fits(document, OF_STUDY):
        parts = [(each, OF_ARM) for each in document["arms"].values()]
        parts += [(each, OF_RUN) for each in document["runs"]]
    for part, hints in parts:
        if not _fits(part, hints):
            raise ConfigError(
                f"results: {expected} {shortened(part)} in {path}, without {', '.join(hints)}"
            )
    return document


def _fits(values: Any, hints: Mapping[str, Any]) -> bool:
    return isinstance(values, dict) and all(
        key in values and mismatch_error(values[key], hint) is None for key, hint in hints.items()
    )


def by_seed(document: Document, arm: str, metric: str) -> dict[int, float]:
    """Return a metric of an arm, or a number of its result such as "loss", by seed."""
    values = _values(document, metric).get(arm, {})
    return {seed: fmean(found.values()) for seed, found in values.items()}


def difference(document: Document, arm: str, reference: str, metric: str) -> Interval | None:
    """Return the interval of arm minus reference, paired by seed; None without a pair of runs."""
    values = _values(document, metric)
    gaps = _gaps(values, arm, reference)
    if not gaps:
        return None
    pool = _pool_of(document, arm)
    pooled = [name for name in values if name != reference and _pool_of(document, name) == pool]
    several = [found for name in pooled if len(found := _gaps(values, name, reference)) > 1]
    return Interval.of(gaps, _pooled_half(several) / len(gaps) ** 0.5)


def _pool_of(document: Document, arm: str) -> str:
    """Return the name of the pool: arms that train, a family of measured arms, or the others."""
    arms = document["arms"]
    if arms[arm]["length"]:
        return "trains"
    family = arms[arm]["family"]
    return family if sum(each["family"] == family for each in arms.values()) > 1 else "measures"


def _values(document: Document, metric: str) -> dict[str, Values]:
    """Return a metric of every arm that has it."""
    found: dict[str, Values] = {}
    for run in document["runs"]:
        value = run["metrics"].get(metric, run.get(metric))
        if value is not None:
            of_seed = found.setdefault(run["arm"], {}).setdefault(run["seed"], {})
            of_seed[run.get("beginning")] = value
    return found


def _gaps(values: dict[str, Values], arm: str, reference: str) -> list[float]:
    """Return arm minus reference, one number per seed, of runs that begin with the same model."""
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


def _pooled_half(several: Sequence[Sequence[float]]) -> float:
    """Return half of the interval of one value from the pooled standard deviation."""
    if not several:
        return 0.0
    pooled, freedom = _pooled_variance(_without_outliers(several))
    return _quantile(freedom) * pooled**0.5


def _without_outliers(several: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Return the samples without variance outliers (Cochran's test at 1%, as in ISO 5725-2)."""
    kept = sorted(several, key=variance)
    while len(kept) > 2:
        *others, widest = kept
        pooled, freedom = _pooled_variance(others)
        limit = f.ppf(1 - OUTLIER / len(kept), len(widest) - 1, freedom)
        if variance(widest) <= limit * pooled:
            break
        kept = others
    return kept


def _pooled_variance(several: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the pooled variance and its degrees of freedom."""
    freedom = sum(len(gaps) - 1 for gaps in several)
    return sum((len(gaps) - 1) * variance(gaps) for gaps in several) / freedom, freedom


def relative_cost(document: Document, arm: str) -> float | None:
    """Return the FLOPs of the arm's image tower relative to the first reference.

    They are those of the whole training run; of one step if the two begin with different models; of
    a forward pass if the arm does not train.
    """
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
    """Return the training time of the arm relative to the first reference, or None if unknown."""
    reference = document["references"][0]
    ours, theirs = (_dense_images(document, each) for each in (arm, reference))
    known = ours is not None and theirs is not None
    return ours / theirs if known and _begin_alike(document, arm, reference) else None


def _begin_alike(document: Document, arm: str, other: str) -> bool:
    """Return True if both arms begin from scratch, or with the same model."""
    arms = document["arms"]
    return arms[arm]["parent"] == arms[other]["parent"]


def _dense_images(document: Document, arm: str) -> float | None:
    """Return how many images the dense model trains on in the time of one run of the arm."""
    times, images = (by_seed(document, arm, key) for key in ("step_time", "images"))
    return median(times.values()) * fmean(images.values()) if times and images else None
