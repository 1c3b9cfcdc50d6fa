"""Recipes: a `RunConfig` read from YAML and changed by dotted overrides.

A recipe contains data, not code, except for a `pipe:` URL in `data.train`, which is a command.
`load_recipe` takes the name of a file in `elip_models/pretraining/recipes` or a path, and
`key=value` overrides. It returns a `RunConfig`, or raises a `ConfigError` with the key, the
requirement and the value. A recipe with `base: NAME` inherits the values of the recipe NAME and
changes some.
"""

import copy
import dataclasses
import inspect
import re
import typing
from collections.abc import Container, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from elip_models.validation import ConfigError, did_you_mean, require_extra, shortened

with require_extra(
    "elip_models.pretraining.training"
):  # before the modules below name another extra
    import yaml

from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.yaml_config import (
    REQUIRED,
    from_mapping,
    parse_yaml,
    read_mapping,
)

FINETUNE = "finetune"
MAX_SECTIONS = 16
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
"""Keys that may change on resuming: length and output of the run, and keys without gradients."""


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: Name of a built-in recipe, or path of a YAML file.
        overrides: `key=value` with dotted keys, such as `optim.lr=3e-4`; values are YAML.

    Raises:
        ConfigError: An unknown recipe or key, a wrong type or range, or a missing required key.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"overrides: expected a list of key=value, got the text {shortened(overrides)}"
        )
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
        model = values.setdefault("model", {})
        own = model.get("overrides") or {} if isinstance(model, dict) else None
        if isinstance(own, dict):  # another kind is an error of `from_mapping`
            model["overrides"] = {**defaults, **own}
    for key, value in overrides.items():
        _set_dotted(values, key, copy.deepcopy(value))  # a later override may change this value
    config = from_mapping(RunConfig, values)
    _check_consistency(config)
    return config


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
        except yaml.YAMLError:
            if text.lstrip().startswith("["):
                raise ConfigError(
                    f"override {shortened(override)}: expected a list in YAML; put its items in "
                    f"quotes, such as {key}=['a.json', '*.tar']"
                ) from None
            values[key.strip()] = text  # a glob such as *.tar is not valid YAML
    return values


def save_recipe(config: RunConfig, path: Path, *, mode: int | None = None) -> None:
    """Write a recipe as YAML that `load_recipe` reads back to an equal config.

    `mode` are the permissions of the file, such as 0o600 if the recipe contains a password; None:
    those of any new file.
    """
    values = _tuples_to_lists(dataclasses.asdict(config))
    from elip_models.saving.files import write_file  # reading a recipe needs no timm

    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_file(path, text.encode(), mode=mode)


def recipe_names(part: str = "") -> list[str]:
    """Return the sorted names of the built-in recipes: of pre-training, or in the folder `part`."""
    folder = resources.files("elip_models.pretraining") / "recipes" / part
    names = (entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(f"{part}/{name}" if part else name for name in names)


class Setting(NamedTuple):
    """A key of a recipe; `source` is where its value comes from: "recipe", "model" or "default"."""

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
    """Return all keys of a built-in recipe, with the defaults of those that it does not set."""
    return _settings(RunConfig, _read_recipe(_find_recipe(name)))


def _settings(cls: type, values: Mapping[str, Any], prefix: str = "") -> list[Setting]:
    hints, meanings, found = typing.get_type_hints(cls), field_meanings(cls), []
    for each in dataclasses.fields(cls):
        key = f"{prefix}{each.name}"
        if dataclasses.is_dataclass(hints[each.name]):
            found += _settings(hints[each.name], values.get(each.name, {}), f"{key}.")
        elif each.name in values:
            found.append(Setting(key, values[each.name], "recipe", meanings[each.name]))
        else:
            made = each.default_factory is not dataclasses.MISSING
            default = each.default_factory() if made else each.default
            value = REQUIRED if default is dataclasses.MISSING else _tuples_to_lists(default)
            found.append(Setting(key, value, "default", meanings[each.name]))
    return found


def field_meanings(cls: type) -> dict[str, str]:
    """Return the first sentence on each attribute in the docstring of a class."""
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
    names = recipe_names() + recipe_names(FINETUNE)
    if name_or_path not in names:
        raise ConfigError(
            f"recipe {shortened(name_or_path)}: expected a path ending in .yaml, or a name that "
            f"`elip recipes` lists{did_you_mean(name_or_path, names)}"
        )
    return Path(
        str(resources.files("elip_models.pretraining") / "recipes" / f"{name_or_path}.yaml")
    )


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


def _check_consistency(config: RunConfig) -> None:
    data, optim, zero_shot = config.data, config.optim, config.data.zero_shot
    if not config.output_dir.strip():
        raise ConfigError("output_dir: expected the name of a folder, got an empty one")
    if optim.steps is None and optim.epochs is None:
        raise ConfigError("optim.steps: expected it or optim.epochs to be set, got neither")
    for key, value, most in (
        ("optim.epochs", optim.epochs, 1_000_000),
        ("optim.grad_accumulation", optim.grad_accumulation, 65_536),
        ("optim.batch_slices", optim.batch_slices, optim.batch_size),
        ("data.randaugment", data.randaugment and data.randaugment[0], 100),
    ):
        if value is not None and value > most:
            raise ConfigError(f"{key}: expected at most {most}, got {value}")
    if config.model.pretrained and (config.model.vision_init or config.model.text_init):
        raise ConfigError(
            "model.pretrained: expected null with model.vision_init or model.text_init, got "
            f"{shortened(config.model.pretrained)}"
        )
    for name in ("min_lr", "warmup_lr"):
        rate = getattr(optim, name)
        if rate is not None and rate > optim.lr:
            raise ConfigError(f"optim.{name}: expected at most optim.lr = {optim.lr}, got {rate}")
    sources = len(data.train) if isinstance(data.train, tuple) else 1
    if data.weights is not None and len(data.weights) != sources:
        raise ConfigError(
            f"data.weights: expected one for each of the {sources} sources of data.train, got "
            f"{len(data.weights)}"
        )
    others = set(config.report) - {"picture"}
    if config.task is not None and (others or zero_shot is not None):
        raise ConfigError(
            f"report, data.zero_shot: expected nothing but 'picture', and null, for the task "
            f"{config.task}, which is scored on data.eval at the end, got {list(config.report)} "
            f"and {shortened(zero_shot)}"
        )
    if "zero_shot" in config.report and zero_shot is None:
        raise ConfigError("data.zero_shot: expected a source, since report names it, got null")
    others = set(config.report) - {"zero_shot"}
    if config.task is None and (data.validation or config.eval.select):
        raise ConfigError(
            "eval.select, data.validation: expected null in pre-training, which has no task, got "
            f"{shortened(config.eval.select)} and {shortened(data.validation)}"
        )
    if config.eval.select and data.validation is None:
        raise ConfigError(
            "data.validation: expected a source, since eval.select selects weights by it, got "
            "null; or set eval.select=null"
        )
    if data.validation is not None and data.validation == data.eval:
        raise ConfigError(
            "data.validation: expected another split than data.eval, whose scores are the result, "
            f"got {shortened(data.validation)} for both"
        )
    if data.eval is None and (others or (config.eval_every and zero_shot is None)):
        raise ConfigError(
            "data.eval: expected a source, since eval_every or report asks for one, got null; "
            "or set eval_every=0 and report=[]"
        )


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    if len(sections) > MAX_SECTIONS:
        raise ConfigError(f"{key:.100}: expected at most {MAX_SECTIONS} sections in a key")
    for depth, section in enumerate(sections, start=1):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            name = ".".join(sections[:depth])
            raise ConfigError(f"{key}: expected {name} to be a section, got {shortened(values)}")
    values[last] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key, those of free-form dictionaries included."""
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _tuples_to_lists(value: Any) -> Any:
    """Convert tuples to lists recursively, since `yaml.safe_dump` writes no tuples."""
    if isinstance(value, Mapping):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, list | tuple) else value
