"""Checks of a study before anything trains."""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.studies.measures import FINETUNED, MEASURES, METRICS
from benchmarks.studies.study import FINETUNE, NAME, TOKENIZER, Arm, Study
from elip_models.validation import ConfigError, shortened

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
    margins = () if study.margin is None else (study.margin,)
    for key, names, known in (
        ("measures", study.measures, MEASURES),
        ("references", study.references, study.arms),
        ("margin", margins, study.arms),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{key}: expected some of {', '.join(known)}, got {shortened(name)}"
                )
    patterns = [pattern for name in study.measures for pattern in METRICS.get(name, ["*"])]
    for metric in study.quality:
        if not any(fnmatchcase(metric, pattern) for pattern in patterns):
            raise ConfigError(
                f"quality: expected metrics of {', '.join(study.measures)}, got {shortened(metric)}"
            )


def _check_arms(study: Study) -> None:
    """Check that each arm begins with an arm before it that trains."""
    trained: list[str] = []
    for name, arm in study.arms.items():
        if arm.parent is not None and arm.parent not in trained:
            raise ConfigError(
                f"arms.{name}.from: expected an arm that trains before it, one of {trained}, got "
                f"{shortened(arm.parent)}"
            )
        if arm.parent is None and arm.length == 0:
            raise ConfigError(f"arms.{name}.length: expected above 0 without 'from', got 0")
        trained += [name] if arm.length else []


def _check_finetuning(study: Study) -> None:
    """Check that the keys `finetune.*` and the measure `finetuned` are both there, or neither."""
    for name, arm in study.arms.items():
        keys = [key for key in study.overrides | arm.overrides if key.startswith(FINETUNE)]
        if bool(keys) != (FINETUNED in study.measures):
            raise ConfigError(
                f"arms.{name}: measures: expected {FINETUNED!r} exactly if there is a block "
                f"'finetune', got {', '.join(study.measures)} and {', '.join(keys) or 'no block'}"
            )
        for key in keys:
            if key.removeprefix(FINETUNE) in OF_RUNNER:
                raise ConfigError(f"{key}: the runner sets it for every run; remove it")
