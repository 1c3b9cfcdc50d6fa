"""Strategies by one line of text: a name of `STRATEGIES`, then its settings.

tome                                     as its paper runs it
tome:r=13
evit:keep_ratio=0.7,layers=3,6,9
elip:scorer=exact,schedule=2(100%) 4(50%)
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from elip_models.reduction.strategies import STRATEGIES
from elip_models.reduction.strategy import Strategy
from elip_models.validation import did_you_mean

SETTING = re.compile(r",\s*(?=\w+\s*=)")  # the commas that begin another setting
WORDS = {"true": True, "false": False, "none": None}


def get_strategy(strategy: str | Strategy, **options: Any) -> Strategy:
    """The strategy that a line of text writes, with `options` beside its settings.

    Args:
        strategy: 'tome', 'tome:r=8', 'elip:scorer=exact,schedule=clip'; or an instance, which is
            returned as it is and holds all options.
        options: settings by name; None leaves one to the text, or else to the strategy's default.

    Raises:
        TypeError, ValueError: a name, a setting or a value that there is not; a setting that is
            given twice.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(strategy, Strategy):
        if given:
            raise ValueError(
                f"{next(iter(given))}: expected it in the strategy, {strategy.name}(...), when one "
                f"is passed whole, got {next(iter(given.values()))!r} beside it"
            )
        return strategy
    name, settings = parse_spec(strategy)
    known = kinds_of(name)
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"{key}: expected none with strategy={strategy!r}, which takes "
                f"{', '.join(known)}, got {value!r}"
            )
        if key in settings:
            raise ValueError(f"{key}: expected it once, got {value!r} beside strategy={strategy!r}")
    return STRATEGIES[name](**settings, **given)


def parse_spec(text: str, table: Mapping[str, type] = STRATEGIES) -> tuple[str, dict[str, Any]]:
    """A line of text -> the name of a dataclass in `table`, and the settings that are written.

    Raises:
        ValueError: a name or a setting that there is not.
    """
    is_strategy = table is STRATEGIES
    of, known = "strategy: " if is_strategy else "", ", ".join(table)
    beside = ", or a Strategy" if is_strategy else ""
    name, colon, rest = (part.strip() for part in str(text).partition(":"))
    if not isinstance(text, str) or name not in table:
        raise ValueError(
            f"{of}expected NAME or NAME:key=value,.. with {known}{beside}, got "
            f"{text!r}{did_you_mean(name, table)}"
        )
    settings: dict[str, Any] = {}
    kinds = kinds_of(name, table)
    for setting in SETTING.split(rest) if colon else ():
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"{of}expected settings key=value in {text!r}, got {setting!r}")
        if key in settings:
            raise ValueError(f"{of}expected {key!r} once in {text!r}, got it twice")
        if key not in kinds:
            raise ValueError(
                f"{of}expected a setting of {name!r}, one of {', '.join(kinds)}, got {key!r}"
            )
        settings[key] = _value(kinds[key], key, value)
    return name, settings


def kinds_of(name: str, table: Mapping[str, type] = STRATEGIES) -> dict[str, Any]:
    """The types of the settings of a strategy, or of what a table names, by name."""
    return {each.name: each.type for each in fields(table[name])}


def _value(kind: Any, key: str, text: str) -> Any:
    """What `text` writes for a setting: a number, several, a word, true, false or none."""
    value: Any = text
    if text.lower() in WORDS and text not in get_args(kind):  # 'none' may be a choice
        value = WORDS[text.lower()]
    elif re.fullmatch(r"[-+.\de]+(\s*,\s*[-+.\de]+)*,?", text):
        value = _number(key, text)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, got {text!r}")
    return value


def _number(key: str, text: str) -> int | float | tuple[int | float, ...]:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(f"{key}: expected a number, got {text!r}") from None
