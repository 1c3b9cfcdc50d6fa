"""Recipes: a `RunConfig` read from YAML and changed by dotted overrides.

A recipe contains data, not code. `load_recipe` takes the name of a file in
`elip_models/pretraining/recipes` or a path, and `key=value` overrides. A recipe with `base: NAME`
inherits the values of the recipe NAME and changes some.
"""

import copy
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.yaml_config import (
    REQUIRED,
    from_mapping,
    parse_yaml,
    read_mapping,
    yaml_text,
)
from elip_models.validation import ConfigError, did_you_mean, require_extra, shortened

with require_extra("elip_models.pretraining.training"):
    from pydantic import TypeAdapter
    from pydantic.dataclasses import is_pydantic_dataclass

RECIPES = Path(__file__).parents[1] / "recipes"
FINETUNE = "finetune"
MAX_BASES = 8
RESUMABLE_KEYS = (
    "name",
    "output_dir",
    "data.eval",
    "data.zero_shot",
    "data.num_workers",
    "data.max_bad_share",
    "optim.steps",
    "optim.epochs",
    "optim.max_nonfinite_steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "report",
)
"""Keys that may change on resuming: length and output of the run, and what changes no gradient."""


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: Name of a built-in recipe, or path of a YAML file.
        overrides: `key=value` with dotted keys, such as `optim.lr=3e-4`; values are YAML.

    Raises:
        ConfigError: An unknown recipe or key, a wrong type or range, or a missing required key.
    """
    return recipe_with(name_or_path, parse_overrides(overrides, "optim.lr=3e-4"))


def recipe_with(
    name_or_path: str | Path,
    overrides: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read a recipe, as `load_recipe` does, and apply overrides by dotted key, in order.

    `defaults` are values of `model.overrides`, for keys that the recipe does not set.
    """
    values = _read_recipe(_find_recipe(str(name_or_path)))
    if defaults:
        values = _merged({"model": {"overrides": dict(defaults)}}, values)
    for key, value in overrides.items():
        _set_dotted(values, key, copy.deepcopy(value))  # a later override may change this value
    for key, value in _flatten(values).items():
        if value == REQUIRED:
            raise ConfigError(f"{key}: required; set {key}=VALUE")
    return from_mapping(RunConfig, values)


def parse_overrides(overrides: Sequence[str], example: str) -> dict[str, Any]:
    """Parse `key=value` texts with values in YAML; errors show `example`, a valid override."""
    values = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override {shortened(override)}: expected key=value, such as {example}"
            )
        try:
            values[key.strip()] = parse_yaml(text)
        except ConfigError:
            values[key.strip()] = text  # a glob such as *.tar is not valid YAML
    return values


def save_recipe(config: RunConfig, path: Path, *, mode: int | None = None) -> None:
    """Write a recipe as YAML that `load_recipe` reads back to an equal config.

    `mode` are the permissions of the file, such as 0o600 if the recipe contains a password; None:
    those of any new file.
    """
    from elip_models.saving.files import write_file  # reading a recipe needs no timm

    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # YAML has no tuples
    write_file(path, yaml_text(plain).encode(), mode=mode)


def recipe_names(part: str = "") -> list[str]:
    """Return the sorted names of the built-in recipes: of pre-training, or in the folder `part`."""
    return sorted(f"{part}/{path.stem}".lstrip("/") for path in (RECIPES / part).glob("*.yaml"))


class Setting(NamedTuple):
    """A key of a recipe; `source` is where its value comes from: "recipe" or "default"."""

    key: str
    value: Any
    source: str
    meaning: str


def recipe_title(name: str) -> str:
    """Return the first line of the comment at the top of a built-in recipe."""
    first, second, *_ = _find_recipe(name).read_text(encoding="utf-8").splitlines()
    text = f"{first} {second}" if first.endswith(":") else first
    return " ".join(text.replace("#", "").split())


def recipe_settings(name: str) -> list[Setting]:
    """Return all keys of a recipe, with the defaults of those that it does not set."""
    return _settings(RunConfig, _read_recipe(_find_recipe(name)))


def _settings(cls: type, values: Mapping[str, Any], prefix: str = "") -> list[Setting]:
    hints, meanings, settings = typing.get_type_hints(cls), _field_meanings(cls), []
    for field in dataclasses.fields(cls):
        name, key = field.name, f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[name]):
            settings += _settings(hints[name], values.get(name, {}), f"{key}.")
        elif name in values:
            settings.append(Setting(key, values[name], "recipe", meanings[name]))
        else:
            is_made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if is_made else field.default
            value = REQUIRED if default is dataclasses.MISSING else default
            settings.append(Setting(key, value, "default", meanings[name]))
    return settings


def _field_meanings(cls: type) -> dict[str, str]:
    """Return the first sentence on each field of a dataclass, from its schema or its docstring."""
    if is_pydantic_dataclass(cls):
        properties = TypeAdapter(cls).json_schema()["properties"]
        texts = {name: entry["description"] for name, entry in properties.items()}
    else:
        attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE))
    return {
        name: re.split(r"\.(?= [A-Z]|$)", " ".join(text.split()))[0] for name, text in texts.items()
    }


def resume_conflicts(
    saved: RunConfig, requested: RunConfig, may_change: Container[str] = RESUMABLE_KEYS
) -> list[str]:
    """Return "key: saved -> requested" for each key that must not change on resuming but does."""
    old, new = (_flatten(dataclasses.asdict(config)) for config in (saved, requested))
    keys = [key for key in old | new if key not in may_change and old.get(key) != new.get(key)]
    return [f"{key}: {shortened(old.get(key))} -> {shortened(new.get(key))}" for key in keys]


def _find_recipe(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe {name_or_path}: no such file")
        return path
    names = {name.removeprefix(f"{FINETUNE}/"): name for name in recipe_names(FINETUNE)}
    names |= {name: name for name in [*recipe_names(), *names.values()]}
    if name_or_path not in names:
        raise ConfigError(
            f"recipe {shortened(name_or_path)}: expected a path ending in .yaml, or a name that "
            f"`elip recipes` lists{did_you_mean(name_or_path, names)}"
        )
    return RECIPES / f"{names[name_or_path]}.yaml"


def _read_recipe(path: Path, depth: int = 1) -> dict[str, Any]:
    """Return the values of a recipe: those of its `base`, then its own."""
    values = read_mapping(path)
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of a recipe, got {shortened(base)}")
    if depth == MAX_BASES:
        raise ConfigError(f"{path}: base: expected at most {MAX_BASES - 1} recipes in a row")
    return _merged(_read_recipe(_find_recipe(base), depth + 1), values)


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with some changed; sections are merged key by key."""
    merged = dict(values)
    for key, value in changes.items():
        old = merged.get(key)
        are_sections = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merged(old, value) if are_sections else value
    return merged


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"{key:.200}: expected {section} to be a section, got {shortened(values)}"
            )
    values[last] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key, those of free-form dictionaries included."""
    flat = {}
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat
