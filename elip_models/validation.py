"""Values held to what is expected of them, and the error where they are not."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """A recipe, an option or an override that cannot be used; the message names the key."""


MISFIT = object()  # what `coerce` returns for a value of another type or range
_UNIONS = (types.UnionType, typing.Union)  # `X | None` is either, as X is a class or Annotated


@dataclass(frozen=True)
class Bounds:
    """The interval a number must lie in."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'at least' if self.includes_low else 'above'} {self.low}"
        left, right = "(["[self.includes_low], ")]"[self.includes_high]
        return f"in {left}{self.low}, {self.high}{right}"


def coerce(hint: Any, value: Any) -> Any:
    """`value` as `hint`, or `MISFIT`; an integer or "1e-3" is a float, a list a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = coerce(arguments[0], value)
        return converted if converted is not MISFIT and converted in arguments[1] else MISFIT
    if origin in _UNIONS:
        fits = (coerce(argument, value) for argument in arguments)
        return next((fit for fit in fits if fit is not MISFIT), MISFIT)
    if origin is Literal:
        return value if value in arguments else MISFIT
    if origin is tuple:
        return _coerce_tuple(arguments, value)
    if origin is dict and arguments[1] is not Any and isinstance(value, dict):
        values = {key: coerce(arguments[1], item) for key, item in value.items()}
        return MISFIT if MISFIT in values.values() else values
    if hint is float and not isinstance(value, bool):
        return _coerce_float(value)
    expected = origin or hint
    if isinstance(value, bool) and expected is not bool:
        return MISFIT
    return value if isinstance(value, expected) else MISFIT


def _coerce_tuple(arguments: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return MISFIT
    hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(hints) != len(value):
        return MISFIT
    items = tuple(coerce(hint, item) for hint, item in zip(hints, value, strict=True))
    return MISFIT if MISFIT in items else items


def _coerce_float(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, int | float | str) else MISFIT
    except ValueError:
        return MISFIT


def describe(hint: Any) -> str:
    """A type hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return "a section of keys"
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1]}"
    if origin in _UNIONS:
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {describe(arguments[0])}"
        return "[" + ", ".join(map(describe, arguments)) + "]"
    if origin is dict and arguments[1] is not Any:
        return f"a mapping, each {describe(arguments[1])}"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, "null" if hint is types.NoneType else "a mapping")


def check_share(name: str, value: float) -> None:
    """Raises where it is no share in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float in (0, 1], got {value!r}")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}: expected a float in (0, 1], got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """Raises where it is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


@contextmanager
def blame(key: str) -> Iterator[None]:
    """Turns an argument error of what runs inside into a ConfigError that begins with `key`."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{key}: {error}") from error
