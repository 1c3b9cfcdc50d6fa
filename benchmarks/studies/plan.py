"""Studies as YAML: one recipe, arms that change its settings, and the seeds of all arms.

    recipe: clip_tiny
    overrides: {optim.steps: 500}            # for every arm
    seeds: [0, 1, 2]
    quality: [dense.r1]
    references: [dense]
    arms:
      dense: {model.overrides.schedule: null}
      tome: {model.overrides.strategy: tome, at_flops: 0.71}
      tome-after: {model.overrides.strategy: tome, at_flops: [0.5, 0.7], from: dense, length: 0}

`from: start` beside `arms` is the default parent of all arms: they begin with its trained model.
`group: clutter` names the folder of the runs. Studies of one group share arms of equal name and
settings, which are run once.

Keys of an arm that are no fields of `Arm` are overrides of the recipe. The seed sets
initialisation, data order and augmentation, so arms of one seed begin with equal weights and see
the same batches.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies.measures import MEASURES, METRICS
from elip_models.models.config import reduction_fields
from elip_models.training.recipe import recipe_with
from elip_models.training.run_config import RunConfig
from elip_models.training.training_data import meta_model
from elip_models.training.yaml_config import from_mapping, read_mapping
from elip_models.validation import (
    ConfigError,
    NonNegative,
    PositiveShare,
    Seed,
    as_config_error,
    did_you_mean,
    mismatch_error,
    shortened,
)

RUNS = Path("runs/studies")
TOKENIZER = "tokenizer"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
MAX_LIKE = 8
QUIET = {
    "report": [],
    "eval_every": 0,
    "trackers": [],
    "log_every": 1,
    "keep_checkpoints": 1,
}
"""Defaults of every run, which measures at the end and logs every loss."""


@dataclass(frozen=True)
class Arm:
    """One setting that a study compares.

    overrides: Dotted keys of the recipe and their values.
    family: Name of the arm in the YAML, which is several arms if `at_flops` is a list.
    at_flops: Share of the dense tower's FLOPs that the arm's strategy is set to: of a training
        step, or of a forward pass if the arm does not train.
    parent: Arm whose trained model of the same seed it begins with; 'from' in YAML.
    length: Training length relative to the recipe's steps or epochs; 0 measures without training.
    """

    overrides: dict[str, Any]
    family: str
    at_flops: PositiveShare | None = None
    parent: str | None = None
    length: NonNegative = 1.0


@dataclass(frozen=True)
class Study:
    """A comparison of arms.

    name: Name of the file.
    group: Folder of the runs in `RUNS`; several studies can share it.
    recipe: Name or path for `load_recipe`.
    seeds: Seeds of the runs.
    quality: Metrics of `MEASURES` that are compared; the chart shows the first ones.
    references: Arms that all others are compared with, paired by seed.
    question: Title of the page.
    paper: What the paper reports on the question.
    measures: Names of `MEASURES`.
    margin: Arm whose deficit in a loss is the margin of equivalence, such as shorter training.
    overrides: Dotted keys of the recipe and their values, for every arm.
    arms: Arms by name, in the order in which they run.
    """

    name: str
    group: str
    recipe: str
    seeds: tuple[Seed, ...]
    quality: tuple[str, ...]
    references: tuple[str, ...]
    question: str
    paper: str
    measures: tuple[str, ...] = ("retrieval",)
    margin: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)

    def config(self, run: "Run") -> RunConfig:
        """Return the recipe of a run.

        Raises:
            ConfigError: an invalid key of an arm.
        """
        arm, folder = self.arms[run.arm], self.folder(run)
        values = {**QUIET, **self.overrides, **arm.overrides, "seed": run.seed}
        values |= {"name": f"{self.group}/{run.arm}/{run.seed}", "output_dir": str(folder)}
        if arm.parent is not None:
            values |= self._model_of(Run(arm.parent, run.seed))
        with as_config_error(f"arms.{run.arm}"):
            config = recipe_with(self.recipe, values)
            values |= _length_of(config, arm.length or 1.0)
            if arm.at_flops is not None:
                values |= _at_flops(config, arm.at_flops, trains=arm.length > 0)
            own_data = any(key.startswith("data.") for key in arm.overrides)
            if config.data.tokenizer == "train" and not own_data:
                values["data.tokenizer"] = str(self.tokenizer)
            config = recipe_with(self.recipe, values)
        if config.data.eval is None:
            raise ConfigError("data.eval: expected held-out samples to measure on, got null")
        return config

    @property
    def tokenizer(self) -> Path:
        """Return the path of the tokenizer of all arms that do not change the data."""
        return self.root / TOKENIZER

    @property
    def root(self) -> Path:
        """Return the folder of all runs."""
        return RUNS / self.group

    def folder(self, run: "Run") -> Path:
        """Return the folder of a run."""
        return self.root / run.arm / str(run.seed)

    def _model_of(self, parent: "Run") -> dict[str, Any]:
        """Return the recipe keys of a run that begins with the model of another."""
        model = str(self.folder(parent) / "model")
        return {"model.pretrained": model, "data.tokenizer": model}


class Run(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int


def load_study(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study.

    Args:
        name_or_path: Name of a file in `benchmarks/studies/recipes`, or path of a YAML file.
        overrides: Dotted keys of the recipe and their values, for every arm. Data keys also replace
            those of single arms.

    Raises:
        ConfigError: unknown study, key, arm or measure, wrong type or range, or an override of a
            key that an arm or the runner sets.
    """
    values = _read(str(name_or_path))
    arms = values.pop("arms", None)
    if not isinstance(arms, dict) or not arms:
        raise ConfigError(f"arms: expected a mapping of names to arms, got {shortened(arms)}")
    overrides = dict(overrides or {})
    values["arms"] = {}
    for name, arm in _arms(arms, values.pop("from", None)):
        if name in values["arms"]:
            raise ConfigError(
                f"arms.{arm.family}: expected arms of other names, got {name!r} twice"
            )
        values["arms"][name] = _on_other_data(arm, overrides)
    _check_overrides(overrides, values["arms"])
    values["overrides"] = _mapping(values, "overrides") | overrides
    name = Path(name_or_path).stem
    study = from_mapping(Study, {"group": name} | values | {"name": name})
    _check(study)
    return study


def study_names() -> list[str]:
    """Return the sorted names of the built-in studies."""
    return sorted(entry.name[:-5] for entry in _built_in().iterdir() if entry.suffix == ".yaml")


def plan(study: Study, *, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Return the runs: all arms of one seed before any arm of the next.

    Args:
        study: The study.
        only: Arms or families of arms, whose parents are added; empty for all arms.
        seeds: Any seeds; empty for those of the study.

    Raises:
        ConfigError: an unknown arm.
    """
    for name in only:
        if name not in _names(study):
            raise ConfigError(
                f"--only: expected arms among {', '.join(study.arms)}, got "
                f"{shortened(name)}{did_you_mean(name, _names(study))}"
            )
    chosen = {name for name, arm in study.arms.items() if not only or {name, arm.family} & {*only}}
    for name in reversed(study.arms):  # parents come before their children
        parent = study.arms[name].parent
        if name in chosen and parent is not None:
            chosen.add(parent)
    arms = [name for name in study.arms if name in chosen]
    return [Run(arm, seed) for seed in seeds or study.seeds for arm in arms]


def seeds_of(text: str | None) -> tuple[int, ...]:
    """Parse seeds such as '0,1,2'; return an empty tuple for None."""
    words = [word.strip() for word in text.split(",")] if text else []
    seeds = [int(word) for word in words if re.fullmatch("[0-9]{1,10}", word)]
    fit = len(set(seeds)) == len(words) and all(
        mismatch_error(each, Seed) is None for each in seeds
    )
    if not fit:
        raise ConfigError(
            f"--seeds: expected numbers such as 0,1,2, each once, got {shortened(text)}"
        )
    return tuple(seeds)


def _read(name_or_path: str, number: int = 1) -> dict[str, Any]:
    """Read a YAML file, on top of the study that it is `like`; arms that are null are removed."""
    if number > MAX_LIKE:
        raise ConfigError(
            f"like: expected at most {MAX_LIKE} studies, each like the next, got more"
        )
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in study_names():
            raise ConfigError(
                f"study {shortened(name_or_path)}: expected a path ending in .yaml or one of "
                f"{', '.join(study_names())}{did_you_mean(name_or_path, study_names())}"
            )
        path = _built_in() / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(f"study {name_or_path}: no such file")
    values = read_mapping(path)
    like = values.pop("like", None)
    if like is None:
        return values
    if not isinstance(like, str):
        raise ConfigError(f"like: expected the name of a study or a path, got {shortened(like)}")
    base = _read(like, number + 1)
    merged = {key: _mapping(base, key) | _mapping(values, key) for key in ("overrides", "arms")}
    merged["arms"] = {name: arm for name, arm in merged["arms"].items() if arm is not None}
    return base | values | merged


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: expected a mapping, got {shortened(found)}")
    return found


def _built_in() -> Path:
    return Path(__file__).parent / "recipes"


def _arms(values: dict[str, Any], start: str | None) -> Iterable[tuple[str, Arm]]:
    """Yield arms by name, `start` first; an arm with several FLOPs shares becomes several arms."""
    for family, settings in sorted(values.items(), key=lambda item: item[0] != start):
        _check_name("arms", family)
        if not isinstance(settings, dict):
            raise ConfigError(
                f"arms.{family}: expected a mapping of keys, got {shortened(settings)}"
            )
        own = {key: settings[key] for key in ("at_flops", "length") if key in settings}
        parent = settings.get("from", None if family == start else start)
        own |= {"parent": parent, "family": family}
        own["overrides"] = {k: v for k, v in settings.items() if k not in ("from", *own)}
        shares = own.get("at_flops")
        for share in shares if isinstance(shares, list) else [shares]:
            try:
                arm = from_mapping(Arm, own | {"at_flops": share})
            except ConfigError as error:
                raise ConfigError(f"arms.{family}.{error}") from None
            is_one = arm.at_flops is None or not isinstance(shares, list)
            yield family if is_one else f"{family}-{arm.at_flops:.2f}", arm


def _names(study: Study) -> list[str]:
    """Return the names of all arms and families."""
    return list(dict.fromkeys([*study.arms, *(arm.family for arm in study.arms.values())]))


def _on_other_data(arm: Arm, overrides: Mapping[str, Any]) -> Arm:
    """Return the arm without the data keys that `overrides` sets for every arm."""
    own = {
        key: value
        for key, value in arm.overrides.items()
        if not key.startswith("data.") or key not in overrides
    }
    return replace(arm, overrides=own)


def _check_overrides(overrides: Mapping[str, Any], arms: Mapping[str, Arm]) -> None:
    """Raise ConfigError for a key that would not reach every arm."""
    for key in overrides:
        if key in ("seed", "name", "output_dir"):
            raise ConfigError(f"{key}: the runner sets it for every run; use --seeds or 'group'")
        own = [name for name, arm in arms.items() if key in arm.overrides]
        if own:
            raise ConfigError(
                f"{key}: expected a key that no arm sets, but {', '.join(own)} set it; "
                "write a YAML file that is 'like' this study"
            )


def _check_name(key: str, name: Any) -> None:
    """Raise ConfigError unless `name` can name a folder of runs."""
    is_name = isinstance(name, str) and NAME.fullmatch(name) and name.strip(".") != ""
    if not is_name or (key, name) == ("arms", TOKENIZER):
        raise ConfigError(
            f"{key}: expected a name of letters, digits, '_', '-' and '.', other than "
            f"{TOKENIZER!r}, got {shortened(name)}"
        )


def _check(study: Study) -> None:
    """Check the names, and the arms, measures and references against each other."""
    _check_name("group", study.group)
    for name in study.arms:
        _check_name("arms", name)
    for key in ("seeds", "quality", "references", "measures"):
        counted = Counter(getattr(study, key)).most_common(1)
        if not counted:
            raise ConfigError(f"{key}: expected one or more, got none")
        if counted[0][1] > 1:
            raise ConfigError(f"{key}: expected each once, got {shortened(counted[0][0])} twice")
    _check_arms(study)
    for name in study.measures:
        if name not in MEASURES:
            raise ConfigError(
                f"measures: expected some of {', '.join(MEASURES)}, got {shortened(name)}"
            )
    named = [("references", each) for each in study.references]
    for key, name in (*named, ("margin", study.margin)):
        if name is not None and name not in study.arms:
            raise ConfigError(
                f"{key}: expected some of {shortened(list(study.arms))}, got {shortened(name)}"
            )
    patterns = [each for name in study.measures for each in METRICS.get(name, ["*"])]
    for metric in study.quality:
        if not any(fnmatchcase(metric, pattern) for pattern in patterns):
            raise ConfigError(
                f"quality: expected metrics of {', '.join(study.measures)}, got "
                f"{shortened(metric)}{did_you_mean(metric, patterns)}"
            )


def _check_arms(study: Study) -> None:
    """Check that each arm begins with an arm before it that trains."""
    before: list[str] = []
    for name, arm in study.arms.items():
        if arm.parent is not None and arm.parent not in before:
            raise ConfigError(
                f"arms.{name}.from: expected one of {before}, got {shortened(arm.parent)}"
            )
        if arm.parent is not None and study.arms[arm.parent].length == 0:
            raise ConfigError(
                f"arms.{name}.from: expected an arm that trains, got {shortened(arm.parent)}"
            )
        if arm.parent is None and arm.length == 0:
            raise ConfigError(f"arms.{name}.length: expected above 0 without 'from', got 0")
        before.append(name)


def _length_of(config: RunConfig, length: float) -> dict[str, Any]:
    """Return the recipe keys of a run that is `length` times as long."""
    if config.optim.steps is not None:
        return {"optim.steps": max(1, round(config.optim.steps * length))}
    return {"optim.epochs": config.optim.epochs * length}


def _at_flops(config: RunConfig, share: float, *, trains: bool) -> dict[str, Any]:
    """Return the recipe keys of a strategy at `share` of the dense tower's FLOPs."""
    model = meta_model(config)
    with as_config_error("at_flops"):
        found = reduction_fields(model.reduction.at_flops(model.tower, share, training=trains))
    return {f"model.overrides.{key}": value for key, value in found.items()}
