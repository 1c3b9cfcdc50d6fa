"""A study: its arms, and the recipes of a run of each.

A run pre-trains by the recipe of the study. With a block `finetune` it then fine-tunes by a recipe
of `elip finetune`, and the scores of the downstream task are its measure `finetuned`. The keys
`finetune.*` of study and arm are the settings of this second stage.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.studies.measures import FINETUNED
from elip_models.pretraining.models.config import reduction_fields
from elip_models.pretraining.models.registry import family_of
from elip_models.pretraining.training.finetune import (
    REDUCTION,
    read_pretrained,
    recipe_for,
    recipe_of,
)
from elip_models.pretraining.training.recipe import recipe_with
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.training_data import meta_model, task_of
from elip_models.pretraining.training.yaml_config import from_mapping
from elip_models.validation import (
    Config,
    ConfigError,
    NonNegative,
    PositiveShare,
    Seed,
    as_config_error,
    did_you_mean,
)

RUNS = Path("runs/studies")
TOKENIZER = "tokenizer"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
FINETUNE = "finetune."
QUIET = {
    "report": [],
    "eval_every": 0,
    "trackers": [],
    "log_every": 1,
    "keep_checkpoints": 1,
}
"""Defaults of every run, which measures at the end and logs every loss."""
STRATEGY = "model.overrides.strategy"


@dataclass(frozen=True)
class Arm(Config):
    """One setting that a study compares.

    overrides: Dotted keys of the recipe and their values; `finetune.*` of the fine-tuning.
    family: Name of the arm in the YAML, which is several arms if `at_flops` is a list.
    at_flops: Share of the dense tower's FLOPs that the arm's strategy is set to: of a training
        step, or of a forward pass if the arm does not pre-train.
    parent: Arm whose trained model of the same seed it begins with; 'from' in YAML.
    length: Training length relative to the recipe's steps or epochs; 0 measures, or fine-tunes,
        the model of the parent.
    """

    overrides: dict[str, Any]
    family: str
    at_flops: PositiveShare | None = None
    parent: str | None = None
    length: NonNegative = 1.0


@dataclass(frozen=True)
class Study(Config):
    """A comparison of arms.

    name: Name of the file.
    group: Folder of the runs in `RUNS`; several studies can share it.
    recipe: Name or path for `load_recipe`.
    seeds: Seeds of the runs.
    quality: Metrics of `MEASURES` that are compared.
    references: Arms that all others are compared with, paired by seed.
    question: Title of the page.
    paper: What the paper reports on the question.
    measures: Names of `MEASURES`.
    margin: Arm whose deficit in a loss is the margin of equivalence, such as shorter training.
    overrides: Dotted keys as those of `Arm`, for every arm.
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
        values = {k: v for k, v in self._settings(run).items() if not k.startswith(FINETUNE)}
        values = {**QUIET, **values, "seed": run.seed}
        values |= {"name": f"{self.group}/{run.arm}/{run.seed}", "output_dir": str(folder)}
        if "model.overrides" not in values:
            values[STRATEGY] = self._strategy(run.arm)
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
        if config.data.eval is None and set(self.measures) != {FINETUNED}:
            raise ConfigError("data.eval: expected held-out samples to measure on, got null")
        return config

    def _strategy(self, name: str) -> str:
        """Return the strategy of an arm: its own, its parent's, or `elip`; not the recipe's."""
        arm = self.arms[name]
        own = (self.overrides | arm.overrides).get(STRATEGY)
        return own or (self._strategy(arm.parent) if arm.parent else "elip")

    def finetuning(self, run: "Run") -> RunConfig | None:
        """Return the recipe of the fine-tuning of a run, which need not have pre-trained yet.

        None if the study has no fine-tuning.

        Raises:
            ConfigError: an invalid recipe, key or metric.
        """
        if FINETUNED not in self.measures:
            return None
        settings = self._settings(run).items()
        values = {k.removeprefix(FINETUNE): v for k, v in settings if k.startswith(FINETUNE)}
        own = {key: values.pop(key) for key in ("recipe", "reduced") if key in values}
        values = {**QUIET, **values, "seed": run.seed, "output_dir": str(self.finetuned(run))}
        values["name"] = f"{self.group}/{run.arm}/{run.seed}/{FINETUNED}"
        with as_config_error(f"arms.{run.arm}: finetune"):
            stage = from_mapping(Finetuning, own)
            config = self._finetuning(run, stage, values)
            self._check_finetuning(run, config)
        return config

    def _finetuning(self, run: "Run", stage: "Finetuning", values: dict[str, Any]) -> RunConfig:
        """Return the recipe that fine-tunes the saved model, or the one that will be saved."""
        arm, pretraining = self.arms[run.arm], self.config(run)
        folder = self.folder(run if arm.length else Run(arm.parent, run.seed)) / "model"
        family, model = family_of(pretraining.model.name), asdict(meta_model(pretraining).config)
        if (folder / "config.json").is_file():
            family, model = read_pretrained(folder)
        with as_config_error("recipe"):
            recipe = recipe_of(stage.recipe, family)
        model |= self.reduction(run)
        try:
            return recipe_for(recipe, family, model, folder, values, reduced=stage.reduced)
        except ConfigError as error:  # name the key as the study has it
            remedy = rf"; set {FINETUNE}\1=VALUE"
            raise ConfigError(re.sub(r"; set (\S+)=VALUE$", remedy, str(error))) from None

    def _check_finetuning(self, run: "Run", config: RunConfig) -> None:
        """Raise ConfigError unless the task has a metric of `quality` and data to score."""
        if config.data.eval is None:
            raise ConfigError("data.eval: expected held-out samples to score, got null")
        before, now = self.config(run).optim.precision, config.optim.precision
        if before != now:
            raise ConfigError(
                f"optim.precision: expected {before!r} as in pre-training, since one process does "
                f"both, got {now!r}"
            )
        metrics = [f"{FINETUNED}.{name}" for name in task_of(config).metrics]
        for metric in self.quality:
            if metric.startswith(f"{FINETUNED}.") and metric not in metrics:
                raise ConfigError(
                    f"quality: expected metrics of {config.task}, {', '.join(metrics)}, got "
                    f"{metric!r}{did_you_mean(metric, metrics)}"
                )

    def reduction(self, run: "Run") -> dict[str, Any]:
        """Return the fields of the model's config that reduce tokens."""
        config = meta_model(self.config(run)).config
        return {name: getattr(config, name) for name in REDUCTION if hasattr(config, name)}

    @property
    def tokenizer(self) -> Path:
        """Return the path of the tokenizer of all arms that do not change the data."""
        return self.root / TOKENIZER

    @property
    def results(self) -> Path:
        """Return the default path of the results."""
        return RUNS / f"{self.name}.json"

    @property
    def root(self) -> Path:
        """Return the folder of all runs."""
        return RUNS / self.group

    def folder(self, run: "Run") -> Path:
        """Return the folder of a run."""
        return self.root / run.arm / str(run.seed)

    def finetuned(self, run: "Run") -> Path:
        """Return the folder of the fine-tuning of a run."""
        return self.folder(run) / FINETUNED

    def _settings(self, run: "Run") -> dict[str, Any]:
        return {**self.overrides, **self.arms[run.arm].overrides}

    def _model_of(self, parent: "Run") -> dict[str, Any]:
        """Return the recipe keys of a run that begins with the model of another."""
        model = str(self.folder(parent) / "model")
        return {"model.pretrained": model, "data.tokenizer": model}


class Run(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int


@dataclass(frozen=True)
class Finetuning:
    """The keys of `finetune` that are no overrides of its recipe.

    recipe: Task, or name or path of a recipe, as in `elip finetune`.
    reduced: Reduce the image tower as in the arm.
    """

    recipe: str
    reduced: bool = False


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
