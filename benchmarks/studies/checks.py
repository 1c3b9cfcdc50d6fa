"""Checks of a study before anything trains."""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.studies.measures import FINETUNED, MEASURES, METRICS
from benchmarks.studies.study import FINETUNE, NAME, TOKENIZER, Arm, Study
from elip_models.validation import ConfigError, did_you_mean, shortened

OF_RUNNER = ("seed", "name", "output_dir", "model.pretrained", "data.tokenizer")
"""Keys of the fine-tuning that follow from the run."""


def check_overrides(overrides: Mapping[str, Any], arms: Mapping[str, Arm]) -> None:
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


def check_name(key: str, name: Any) -> None:
    """Raise ConfigError unless `name` can name a folder of runs."""
    is_name = isinstance(name, str) and NAME.fullmatch(name) and name.strip(".") != ""
    if not is_name or (key, name) == ("arms", TOKENIZER):
        raise ConfigError(
            f"{key}: expected a name of letters, digits, '_', '-' and '.', other than "
            f"{TOKENIZER!r}, got {shortened(name)}"
        )


def check_study(study: Study) -> None:
    """Check the names, and the arms, measures and references against each other."""
    check_name("group", study.group)
    for name in study.arms:
        check_name("arms", name)
    for key in ("seeds", "quality", "references", "measures"):
        counted = Counter(getattr(study, key)).most_common(1)
        if not counted:
            raise ConfigError(f"{key}: expected one or more, got none")
        if counted[0][1] > 1:
            raise ConfigError(f"{key}: expected each once, got {shortened(counted[0][0])} twice")
    _check_arms(study)
    _check_finetuning(study)
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


def _check_finetuning(study: Study) -> None:
    """Check that the keys `finetune.*` and the measure `finetuned` are both there, or neither."""
    for name, arm in study.arms.items():
        keys = [key for key in study.overrides | arm.overrides if key.startswith(FINETUNE)]
        if keys and FINETUNED not in study.measures:
            raise ConfigError(
                f"measures: expected {FINETUNED!r} among them, since {keys[0]} is set, got "
                f"{shortened(list(study.measures))}"
            )
        for key in keys:
            if key.removeprefix(FINETUNE) in OF_RUNNER:
                raise ConfigError(f"{key}: the runner sets it for every run; remove it")
        if FINETUNED in study.measures and f"{FINETUNE}recipe" not in keys:
            raise ConfigError(
                f"arms.{name}: finetune.recipe: expected a recipe of `elip finetune`, since "
                f"'measures' has {FINETUNED!r}, got none"
            )
