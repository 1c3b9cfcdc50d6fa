"""Strategies from the arguments of `reduce_` and of the command line.

A strategy is written as one line: a name in `STRATEGIES`, then its settings.

    tome                                     the settings of its paper
    tome:r=13
    evit:keep_ratio=0.7,layers=3,6,9
    elip:scorer=exact,schedule=2(100%) 4(50%)
    calibrated.json                          a file that `elip calibrate` wrote
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

from elip_models.reduction.serialization import read_strategy
from elip_models.reduction.strategies import STRATEGIES
from elip_models.reduction.strategies.elip import ELIP, ELIPOptions
from elip_models.reduction.strategies.tome import ToMe
from elip_models.reduction.strategy import Strategy
from elip_models.towers import Tower
from elip_models.validation import (
    Count,
    PositiveInt,
    PositiveShare,
    Rate,
    Share,
    did_you_mean,
    shortened,
)

SETTING = re.compile(r",\s*(?=\w+\s*=)")  # the commas that begin another setting
NUMBERS = re.compile(r"[-+.0-9e]+(\s*,\s*[-+.0-9e]+)*,?")
WORDS = {"true": True, "false": False, "none": None}


class StrategyOptions(ELIPOptions, total=False):
    """The options of all built-in strategies beside `schedule`, as keyword arguments."""

    r: Count | Rate | tuple[Count, ...] | None
    compare: Literal["mean_key", "keys", "tokens"] | None
    keep_norm: bool | None
    class_token_only: bool | None
    position: Literal["kept", "mean"] | None
    protect: Rate | None
    weight: float | None
    margin: Share | None
    keep_ratio: PositiveShare | None
    layers: Literal["all"] | tuple[Count, ...] | None
    attention_gradient: bool | None
    until: Count | None
    size: PositiveInt | None
    keep_mass: PositiveShare | None


def resolve_strategy(
    tower: Tower,
    strategy: str | Strategy | None,
    options: Mapping[str, Any],
    *,
    keep: float | None,
    default: Callable[[], Strategy],
) -> Strategy:
    """Return the strategy that the arguments of `reduce_` describe, fitted to the tower.

    `options` include `schedule`; None as a value means not given. `default` returns the strategy if
    neither a strategy nor a schedule is given. It raises the errors of `reduce_`.
    """
    if tower.num_patches < 1:
        height, width = tower.image_size
        raise ValueError(
            f"model: expected images of at least one patch, got {height} x {width} pixels; open "
            "the model for larger images"
        )
    options = {name: value for name, value in options.items() if value is not None}
    if strategy is None and "schedule" in options:
        strategy = ELIP.name
    if strategy is None:
        _check_no_options(options)
        chosen = default()
    else:
        chosen = get_strategy(strategy, **options)
        check_keep(strategy, options, keep)
    chosen = chosen.fitted(tower)
    return chosen if keep is None else chosen.at_keep(tower, keep)


def get_strategy(strategy: str | Strategy, **options: Any) -> Strategy:
    """Return the strategy that a line of text describes, with `options` added to its settings.

    An option that is None leaves the setting of the text, or the strategy's default. An instance is
    returned unchanged and takes no options.

    Raises:
        TypeError, ValueError: an unknown name or setting, a wrong value, or a setting given twice.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if _is_file(strategy):
        strategy = read_strategy(strategy)
    if isinstance(strategy, Strategy):
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"{name}: expected it inside the instance, {strategy.name}({name}=..), since a "
                f"Strategy instance takes no options, got {shortened(value)} beside it"
            )
        return strategy
    return from_line(strategy, given)


def from_line(line: str, given: Mapping[str, Any], table: Mapping[str, type] = STRATEGIES) -> Any:
    """Return the dataclass of `table` that a line describes, with the settings `given` added.

    Raises:
        TypeError, ValueError: an unknown name or setting, a wrong value, or a setting given twice.
    """
    name, settings = parse_spec(line, table)
    known = kinds_of(name, table)
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"{key}: expected none with strategy={shortened(line)}, which takes "
                f"{', '.join(known)}, got {shortened(value)}{did_you_mean(key, known)}"
            )
        if key in settings:
            raise ValueError(
                f"{key}: expected it once, got {shortened(value)} beside strategy={shortened(line)}"
            )
    return table[name](**settings, **given)


def _is_file(strategy: Any) -> bool:
    return isinstance(strategy, str) and strategy.endswith(".json")


def check_keep(
    strategy: str | Strategy, options: Mapping[str, Any], keep: float | None, *, name: str = "keep"
) -> None:
    """Raise ValueError if `keep` and the strategy's own option both set how many tokens stay.

    `options` are given beside `strategy`. A field of an instance counts as given if it differs from
    its default. `name` is the name of the target in the message.
    """
    if keep is None:
        return
    if _is_file(strategy):
        strategy = read_strategy(strategy)
    if isinstance(strategy, Strategy):
        own, given = strategy.keep_field, {}
        for field in fields(strategy):
            if getattr(strategy, field.name) != field.default:
                given[field.name] = getattr(strategy, field.name)
    else:
        kind, settings = parse_spec(strategy)
        own, given = STRATEGIES[kind].keep_field, {**settings, **options}
    if given.get(own) is not None:
        value = given[own] if isinstance(given[own], int | float | tuple) else str(given[own])
        raise ValueError(
            f"{name}: expected no {own} beside it, since both set how many tokens stay, got "
            f"{name}={shortened(keep)} and {own}={shortened(value)}; pass one of the two"
        )


def _check_no_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if there is an option: the default strategy takes none."""
    for name, value in options.items():
        owners = [key for key in STRATEGIES if name in kinds_of(key)]
        if not owners:
            known = {option for key in STRATEGIES for option in kinds_of(key)} | {"keep"}
            raise ValueError(
                f"{name}: expected an option of a strategy, got {name}={shortened(value)}"
                f"{did_you_mean(name, sorted(known))}"
            )
        reason = "is set by keep alone" if ToMe.name in owners else "has no such option"
        raise ValueError(
            f"{name}: expected a strategy beside it, since the default, {ToMe.name!r}, {reason}, "
            f"got {name}={shortened(value)}; strategies with it: {', '.join(map(repr, owners))}. "
            f"Pass strategy={owners[0]!r}"
        )


def parse_spec(text: str, table: Mapping[str, type] = STRATEGIES) -> tuple[str, dict[str, Any]]:
    """Return the name of a dataclass in `table`, and the settings, of 'NAME:key=value,..'.

    Raises:
        ValueError: an unknown name or setting.
    """
    is_strategy = table is STRATEGIES
    prefix, known = "strategy: " if is_strategy else "", ", ".join(table)
    or_instance = ", or a Strategy" if is_strategy else ""
    name, colon, rest = (
        part.strip() for part in (text if isinstance(text, str) else "").partition(":")
    )
    if name not in table:
        raise ValueError(
            f"{prefix}expected NAME or NAME:key=value,.. with {known}{or_instance}, got "
            f"{shortened(text)}{did_you_mean(name, table)}"
        )
    settings: dict[str, Any] = {}
    kinds = kinds_of(name, table)
    for setting in SETTING.split(rest) if colon else ():
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not key or not value:
            raise ValueError(
                f"{prefix}expected settings key=value in {shortened(text)}, got "
                f"{shortened(setting)}"
            )
        if key in settings:
            raise ValueError(
                f"{prefix}expected {shortened(key)} once in {shortened(text)}, got it twice"
            )
        if key not in kinds:
            raise ValueError(
                f"{prefix}expected a setting of {name!r}, one of {', '.join(kinds)}, got "
                f"{shortened(key)}{did_you_mean(key, kinds)}"
            )
        settings[key] = _value(kinds[key], key, value)
    return name, settings


def kinds_of(name: str, table: Mapping[str, type] = STRATEGIES) -> dict[str, Any]:
    """Return the types of the settings of a strategy, or of another dataclass in `table`."""
    return {each.name: each.type for each in fields(table[name])}


def _value(kind: Any, key: str, text: str) -> Any:
    """Return the value that `text` writes: a number, several, a word, true, false or none."""
    value: Any = text
    if text.lower() in WORDS and text not in get_args(kind):  # 'none' may be a choice
        value = WORDS[text.lower()]
    elif NUMBERS.fullmatch(text):
        value = _number(key, text)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, got {shortened(text)}")
    return value


def _number(key: str, text: str) -> int | float | tuple[int | float, ...]:
    """Return the number or the tuple of numbers that `text` writes."""
    try:
        numbers = tuple(
            float(each) if {".", "e"} & {*each} else int(each)
            for each in text.removesuffix(",").split(",")
        )
    except ValueError:
        raise ValueError(f"{key}: expected a number, got {shortened(text)}") from None
    return numbers if "," in text else numbers[0]
