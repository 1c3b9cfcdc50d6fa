"""Frozen dataclasses, nested ones included, from the mapping of a YAML file.

Values are checked against the type hints of the fields. An error is a `ConfigError` with the dotted
key, the requirement and the value.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from elip_models.validation import (
    UNIONS,
    WORDS,
    ConfigError,
    describe_type,
    did_you_mean,
    item_hints,
    mismatch_error,
    require_extra,
    shortened,
)

with require_extra("elip_models.pretraining.training"):
    import yaml

REQUIRED = "???"
"""The value, in a recipe, of a key that the user has to set."""

YAML_WORDS = WORDS | {
    bool: "true or false",
    types.NoneType: "null",
    tuple: "a list",
    dict: "a mapping",
}
"""Names of types in YAML."""

MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 2**17, 2**14, 32, 500
"""Largest text, number of values, depth, and length of a number of YAML."""
_TAG = "tag:yaml.org,2002:"
_KINDS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """A loader of plain values: no dates, no key twice, and no more values than MAX_NODES."""

    yaml_constructors = {  # noqa: RUF012, a table of yaml
        tag: each
        for tag, each in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in _KINDS
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [each for each in pairs if each[0] in {*_KINDS, f"{_TAG}merge"}]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.nodes = 0, 0
        self.sizes: dict[yaml.Node, int] = {}  # number of values, those of aliases repeated

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event, before = self.peek_event(), self.nodes
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _mistake(f"expected at most {MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        of_itself = MAX_NODES + 1  # an alias inside its own anchor
        is_alias = isinstance(event, yaml.AliasEvent)
        self.nodes += self.sizes.get(node, of_itself) if is_alias else 1
        if self.nodes > MAX_NODES:
            raise _mistake(f"expected at most {MAX_NODES} values, those of aliases repeated", event)
        self.sizes.setdefault(node, self.nodes - before)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                raise _mistake(
                    f"expected text as key, got {shortened(key.value)}; put it in quotes", key
                )
            if key.value in keys:
                raise _mistake(f"expected each key once, got {shortened(key.value)} twice", key)
            keys.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > MAX_DIGITS:
                raise OverflowError
            return super().construct_object(node, deep)
        except (LookupError, ValueError, OverflowError):  # such as !!bool foo, 0x_
            kind, got = node.tag.removeprefix(_TAG), shortened(node.value)
            raise _mistake(f"expected a value of !!{kind}, got {got}", node) from None


def _mistake(problem: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"line {place.start_mark.line + 1}: {problem}")


def parse_yaml(text: str) -> Any:
    """Return the plain value that a YAML text describes; raise YAMLError if it is not valid."""
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"expected at most {MAX_BYTES} bytes, got more")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise ConfigError if it cannot be read or has none."""
    try:
        with path.open("rb") as file:
            values = parse_yaml(file.read(MAX_BYTES + 1).decode())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error!s:.500}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    return values


def from_mapping(cls: type, values: Any) -> Any:
    """Return an instance of the dataclass `cls` with the values of a mapping."""
    return _build(cls, values, "", cls)


def _build(cls: type, values: Any, prefix: str, root: type) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix[:-1]}: expected a section of keys, got {shortened(values)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in hints:
            raise ConfigError(_unknown_key(f"{prefix}{key}", root))
    arguments = {}
    for spec in dataclasses.fields(cls):
        key = f"{prefix}{spec.name}"
        if spec.name in values:
            arguments[spec.name] = _convert(hints[spec.name], values[spec.name], key, root)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key}: expected {_expected(hints[spec.name])}, got nothing")
    return cls(**arguments)


def _expected(hint: Any) -> str:
    return (
        "a section of keys" if dataclasses.is_dataclass(hint) else describe_type(hint, YAML_WORDS)
    )


def _convert(hint: Any, value: Any, key: str, root: type) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.", root)
    expected = _expected(hint)
    if isinstance(value, str) and value == REQUIRED:
        raise ConfigError(f"{key}: expected {expected}, got {REQUIRED}; set {key}=VALUE")
    parsed = _parse(value, hint)
    if mismatch_error(parsed, hint) is not None:
        raise ConfigError(f"{key}: expected {expected}, got {shortened(value)}")
    return parsed


def _parse(value: Any, hint: Any) -> Any:
    """Convert a YAML value to `hint` if possible: 1 and "1e-3" to float, a list to a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _parse(value, arguments[0])
    if origin in UNIONS:
        parsed = [(_parse(value, each), each) for each in arguments]
        return next((new for new, each in parsed if mismatch_error(new, each) is None), value)
    if origin is tuple and isinstance(value, list | tuple):
        hints = item_hints(arguments, len(value))
        return tuple(map(_parse, value, hints)) if len(hints) == len(value) else value
    if origin is dict and isinstance(value, dict):
        return {key: _parse(item, arguments[1]) for key, item in value.items()}
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    return value


def _unknown_key(key: str, root: type) -> str:
    known = list(_known_keys(root, ""))
    section, _, leaf = key.rpartition(".")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    listed = f"; {section or 'a recipe'} has {', '.join(siblings)}" if siblings else ""
    return f"{key:.200}: no such key{listed}{did_you_mean(key, same_leaf or known, cutoff=0.0)}"


def _known_keys(cls: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _known_keys(hint, f"{prefix}{name}.")


def yaml_line(value: Any) -> str:
    """Return a value as YAML in one line, as in an override."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
