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
A block `finetune` adds a second stage to every run:

    finetune: {recipe: retrieval_tiny, optim.steps: 100}
    measures: [finetuned]
    quality: [finetuned.image_to_text_r1, finetuned.text_to_image_r1]
    arms:
      dense: {model.overrides.schedule: null}
      tome: {model.overrides.strategy: tome, finetune: {reduced: true}}
      same: {model.overrides.strategy: tome, from: tome, length: 0, finetune: {reduced: false}}

A run fine-tunes its pre-trained model by that recipe of `elip finetune`, and the task's scores are
the measure `finetuned`. An arm changes keys of the block. `reduced` keeps the arm's reduction. An
arm of length 0 fine-tunes the pre-trained model of its parent.

`group: clutter` names the folder of the runs. Studies of one group share arms of equal name and
settings, which are run once.

Keys of an arm that are no fields of `Arm` are overrides of the recipe. The seed sets
initialisation, data order and augmentation, so arms of one seed begin with equal weights and see
the same batches.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.studies.checks import check_name, check_overrides, check_study
from benchmarks.studies.study import FINETUNE, Arm, Run, Study
from elip_models.pretraining.training.yaml_config import from_mapping, read_mapping
from elip_models.validation import (
    ConfigError,
    as_config_error,
    did_you_mean,
    shortened,
)

MAX_LIKE = 8
BUILT_IN = Path(__file__).parent / "recipes"


def load_study(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study.

    Args:
        name_or_path: Name of a file in `benchmarks/studies/recipes`, or path of a YAML file.
        overrides: Dotted keys of the recipe and their values, for every arm; `finetune.*` for those
            of the fine-tuning. Data keys of the recipe also replace those of single arms.

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
    check_overrides(overrides, values["arms"])
    values["overrides"] = _mapping(values, "overrides") | overrides
    name = Path(name_or_path).stem
    study = from_mapping(Study, {"group": name} | values | {"name": name})
    check_study(study)
    return study


def study_names() -> list[str]:
    """Return the sorted names of the built-in studies."""
    return sorted(entry.name[:-5] for entry in BUILT_IN.iterdir() if entry.suffix == ".yaml")


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
    seeds = tuple(int(word) for word in words if re.fullmatch("[0-9]{1,10}", word))
    if len({*seeds}) < len(words):
        raise ConfigError(
            f"--seeds: expected numbers such as 0,1,2, each once, got {shortened(text)}"
        )
    return seeds


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
        path = BUILT_IN / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(f"study {name_or_path}: no such file")
    values = read_mapping(path)
    if "finetune" in values:
        values["overrides"] = _mapping(values, "overrides") | _finetuning(values)
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


def _finetuning(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the block `finetune`, if any, and return its values by dotted key."""
    found = _mapping(values, "finetune")
    values.pop("finetune", None)
    return {f"{FINETUNE}{key}": value for key, value in found.items()}


def _arms(values: dict[str, Any], start: str | None) -> Iterable[tuple[str, Arm]]:
    """Yield arms by name, `start` first; an arm with several FLOPs shares becomes several arms."""
    for family, settings in sorted(values.items(), key=lambda item: item[0] != start):
        check_name("arms", family)
        if not isinstance(settings, dict):
            raise ConfigError(
                f"arms.{family}: expected a mapping of keys, got {shortened(settings)}"
            )
        with as_config_error(f"arms.{family}"):
            settings = settings | _finetuning(settings)
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
