"""Frozen dataclasses from the mapping of a YAML file, checked by pydantic.

An error is a `ConfigError` with the dotted key, the requirement and the value.
"""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elip_models.validation import ConfigError, did_you_mean, require_extra, shortened

with require_extra("elip_models.pretraining.training"):
    import yaml
    from pydantic import TypeAdapter, ValidationError

REQUIRED = "???"
"""The value, in a recipe, of a key that the user has to set."""


MAX_ALIASES = 64
"""Aliases in a file: nested ones would make a short file an endless value."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as in YAML 1.2, and a key may not occur twice."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_ALIASES:
            raise yaml.YAMLError(f"expected at most {MAX_ALIASES} aliases, got more")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: key {shortened(name)} occurs twice")
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text as JSON has it: dates and keys are text.

    Raises:
        ConfigError: The text is not valid YAML.
    """
    try:
        return json.loads(json.dumps(yaml.load(text, _Loader), default=str))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {error!s:.500}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise ConfigError if it cannot be read or has none."""
    try:
        values = parse_yaml(path.read_bytes())
    except (OSError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    return values


def yaml_text(value: Any) -> str:
    """Return a plain value as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def yaml_line(value: Any) -> str:
    """Return a value as YAML in one line, as in an override."""
    text = yaml.safe_dump(
        json.loads(json.dumps(value)), default_flow_style=True, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def from_mapping(cls: type, values: Any) -> Any:
    """Return an instance of the dataclass `cls` with the values of a mapping."""
    try:  # strict JSON: lists are tuples and 1 is a float, but neither "1" nor true is a number
        text = json.dumps(values, default=dataclasses.asdict)
        return TypeAdapter(cls).validate_json(text, strict=True)
    except ValidationError as error:
        raise _config_error(error, cls, values) from None


def _config_error(error: ValidationError, cls: type, values: Any) -> ConfigError:
    """Return the first error of pydantic as one sentence with the key."""
    errors = error.errors(include_url=False)
    first = errors[0]
    key = _key_of(first["loc"], values)
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        key = ".".join(map(str, first["loc"]))
        return ConfigError(f"{key}: required; set {key}=VALUE")
    if first["type"] == "unexpected_keyword_argument":
        known = list(_known_keys(cls))
        leaf = key.rpartition(".")[2]
        same = [name for name in known if name.rpartition(".")[2] == leaf]
        close = did_you_mean(key, same or known, cutoff=0.0)
        return ConfigError(f"{key:.200}: unknown key{close}")
    if first["type"] == "value_error":  # of our own checks, which begin with the name of a field
        return ConfigError(f"{key}.{first['ctx']['error']}".lstrip("."))
    wanted = [e["msg"] for e in errors if _key_of(e["loc"], values) == key]  # of a union: several
    expected = " or ".join(re.sub(r"^\w+ should", "must", text) for text in dict.fromkeys(wanted))
    return ConfigError(f"{key}: {expected}, got {shortened(first['input'])}")


def _key_of(location: Sequence[str | int], values: Any) -> str:
    """Return the dotted key of a location, without pydantic's names of the parts of a union."""
    names = []
    for name in location:
        try:
            values = values[name]
        except (LookupError, TypeError):
            break
        names.append(str(name))
    return ".".join(names)


def _known_keys(cls: type) -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        yield name
        if dataclasses.is_dataclass(hint):
            yield from (f"{name}.{inner}" for inner in _known_keys(hint))
