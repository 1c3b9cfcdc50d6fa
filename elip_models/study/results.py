"""The results of a study: one small JSON file, and what it says of each arm.

    {"study": .., "question": .., "paper": .., "recipe": .., "overrides": {..}, "quality": [..],
     "references": [..], "arms": {..}, "runs": [{"arm": .., "seed": .., "metrics": {..}, ..}, ..]}

Arms of one seed share initialisation and data, so differences are taken seed by seed. An interval
is that of the mean by Student's t: 95% of intervals made so hold the mean of all seeds.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from elip_models.models.files import write_file
from elip_models.study.plan import RUNS, Run, Study
from elip_models.study.runner import result_of
from elip_models.validation import ConfigError, extra

with extra("elip_models.study"):
    from filelock import FileLock
    from scipy.stats import t

LEVEL = 0.95
Document = dict[str, Any]


class Interval(NamedTuple):
    """A mean over seeds, and half the length of its interval; None with a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of one value a seed, at least one."""
        n = len(values)
        if n == 1:
            return cls(values[0], None)
        return cls(fmean(values), float(t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / n**0.5)

    @property
    def verdict(self) -> str:
        """Of a difference: which side of zero the whole interval lies on."""
        if self.half is None:
            return "one seed"
        if abs(self.mean) <= self.half:
            return "no difference seen"
        return "above" if self.mean > 0 else "below"


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
    gone, stay there as long as their arm is what it was."""
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
    """The runs of both, by arm and seed."""
    arms = list(document["arms"])
    if any(before.get(key) != document[key] for key in ("recipe", "overrides")):
        return document["runs"]
    unchanged = {arm for arm in arms if before["arms"].get(arm) == document["arms"][arm]}
    old = {(run["arm"], run["seed"]): run for run in before["runs"] if run["arm"] in unchanged}
    runs = old | {(run["arm"], run["seed"]): run for run in document["runs"]}
    return [runs[key] for key in sorted(runs, key=lambda key: (arms.index(key[0]), key[1]))]


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
    found: dict[int, float] = {}
    for run in document["runs"]:
        value = run["metrics"].get(metric, run.get(metric))
        if run["arm"] == arm and value is not None:
            found[run["seed"]] = value
    return found


def difference(document: Document, arm: str, reference: str, metric: str) -> Interval | None:
    """The arm less the reference, seed by seed; None where they share no seed."""
    ours, theirs = (by_seed(document, each, metric) for each in (arm, reference))
    shared = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Interval.of(shared) if shared else None


def relative_cost(document: Document, arm: str) -> float | None:
    """Training FLOPs of the arm's tower against those of the first reference: of the whole run, or
    of one step where it begins with another model than that."""
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
    """Training time of the arm against that of the first reference, of the seeds that both have."""
    reference = document["references"][0]
    ours, theirs = (_seconds(document, each) for each in (arm, reference))
    shared = [ours[seed] / theirs[seed] for seed in ours if seed in theirs]
    return fmean(shared) if shared and _begin_alike(document, arm, reference) else None


def _begin_alike(document: Document, arm: str, other: str) -> bool:
    """Both begin at random, or with the same model."""
    arms = document["arms"]
    return arms[arm]["parent"] == arms[other]["parent"]


def _seconds(document: Document, arm: str) -> dict[int, float]:
    """Of training, by seed: the median step times the images of the run."""
    per_step, images = (by_seed(document, arm, key) for key in ("seconds_per_step", "images"))
    return {seed: per_step[seed] * images[seed] for seed in per_step}
