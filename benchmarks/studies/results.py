"""Results of a study: one small JSON file, and the values, costs and pairs that it has.

    {"study": .., "question": .., "paper": .., "recipe": .., "overrides": {..}, "quality": [..],
     "references": [..], "arms": {..}, "runs": [{"arm": .., "seed": .., "metrics": {..}, ..}, ..]}

Arms of one seed share initialisation and data, so differences are paired by seed. Runs are paired
only if they begin with the same model: after a parent arm is trained again, its old and new
children are not paired. `benchmarks.studies.analysis` computes the statistics.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from benchmarks.studies.runner import result_of
from benchmarks.studies.study import RUNS, Run, Study
from elip_models.saving.files import read_object, write_file
from elip_models.validation import (
    ConfigError,
    as_config_error,
    require_extra,
    shortened,
)

with require_extra("benchmarks.studies"):
    from filelock import FileLock
    from scipy.stats import t

LEVEL = 0.95
Document = dict[str, Any]
OF_STUDY = {"study", "question", "paper", "recipe", "overrides", "quality", "references"}
OF_ARM = {"parent", "length"}
OF_RUN = {"arm", "seed", "metrics", "measured_on", "commit"}
Beginning = float | None
Values = dict[int, dict[Beginning, float]]  # by seed, and by the model that the run begins with


class Interval(NamedTuple):
    """Mean over seeds with its confidence interval.

    half: Half of the interval; None with one seed, or if all seeds have the same value.
    seeds: Number of seeds.
    detectable: Smallest difference that is significant with 80% power.
    pooled: True if the standard error is that of all arms, False if it is that of this arm.
    """

    mean: float
    half: float | None
    seeds: int = 1
    detectable: float | None = None
    pooled: bool = False

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Return the mean of one value per seed with Student's interval."""
        count = len(values)
        if count == 1:
            return cls(values[0], None)
        quantile = float(t.ppf((1 + LEVEL) / 2, count - 1))
        return cls(fmean(values), quantile * stdev(values) / count**0.5, count)

    @property
    def is_significant(self) -> bool:
        """Return True if the interval of a difference excludes zero."""
        return self.half is not None and abs(self.mean) > self.half


def is_loss(metric: str) -> bool:
    """Return True for losses, which have no unit and are better if lower."""
    return metric.rpartition(".")[2].startswith("loss") or metric.endswith("loss")


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
    expected = "expected a file that `python -m benchmarks.studies` wrote, got"
    if not path.is_file():
        raise ConfigError(f"results: {expected} {path}")
    with as_config_error("results"):
        document = read_object(path)
    arms, runs = document.get("arms"), document.get("runs")
    is_study = isinstance(arms, dict) and isinstance(runs, list) and document.keys() >= OF_STUDY
    parts = [(arm, OF_ARM) for arm in arms.values()] if is_study else []
    parts += [(run, OF_RUN) for run in runs] if is_study else []
    fits = all(isinstance(part, dict) and part.keys() >= keys for part, keys in parts)
    if not (is_study and fits):
        raise ConfigError(f"results: {expected} {shortened(document)} in {path}")
    return document


def by_seed(document: Document, arm: str, metric: str) -> dict[int, float]:
    """Return a metric of an arm, or a number of its result such as "loss", by seed."""
    values = values_of(document, metric).get(arm, {})
    return {seed: fmean(found.values()) for seed, found in values.items()}


def values_of(document: Document, metric: str) -> dict[str, Values]:
    """Return a metric of every arm that has it."""
    found: dict[str, Values] = {}
    for run in document["runs"]:
        value = run["metrics"].get(metric, run.get(metric))
        if value is not None:
            of_seed = found.setdefault(run["arm"], {}).setdefault(run["seed"], {})
            of_seed[run.get("beginning")] = value
    return found


def differences_by_seed(values: dict[str, Values], arm: str, reference: str) -> dict[int, float]:
    """Return arm minus reference by seed, of runs that begin with the same model."""
    ours, theirs = values.get(arm, {}), values.get(reference, {})
    of_seeds = {
        seed: [
            our - their
            for here, our in ours[seed].items()
            for there, their in theirs.get(seed, {}).items()
            if here == there or None in (here, there)
        ]
        for seed in sorted(ours)
    }
    return {seed: fmean(gaps) for seed, gaps in of_seeds.items() if gaps}


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
