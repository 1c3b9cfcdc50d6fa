"""Strategies by one line of text: a name of `STRATEGIES`, then its settings.

tome                                     as its paper runs it
tome:r=13
evit:keep_rate=0.7,layers=3,6,9
elip:scorer=exact,schedule=2(100%) 4(50%)
"""

import ast
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from elip_models.reduction.schedule import Schedule
from elip_models.reduction.strategies import STRATEGIES, default_strategy
from elip_models.reduction.strategy import Strategy
from elip_models.towers import Size

SETTING = re.compile(r",\s*(?=\w+\s*=)")  # the commas that begin another setting
VIT_B16 = Size((224, 224), 196, 1, 768, 3072, 12, 12)
WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class StrategySpec:
    """A strategy whose settings, where none are written, wait for the size of a tower."""

    text: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "StrategySpec":
        """Raises TypeError or ValueError for a name, a setting or a value that there is not."""
        name, colon, rest = (part.strip() for part in text.partition(":"))
        if name not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ValueError(f"expected NAME or NAME:key=value,.. with {known}, got {text!r}")
        settings: dict[str, Any] = {}
        for setting in SETTING.split(rest) if colon else ():
            key, equals, value = (part.strip() for part in setting.partition("="))
            if not equals or not key or not value:
                raise ValueError(f"expected settings key=value in {text!r}, got {setting!r}")
            if key in settings:
                raise ValueError(f"expected {key!r} once in {text!r}, got it twice")
            settings[key] = _value(name, key, value)
        spec = cls(text.strip(), name, settings)
        spec.build()
        return spec

    def build(self, size: Size = VIT_B16, schedule: str | None = None) -> Strategy:
        """The strategy for a tower of that size.

        schedule: where the text has none; None is ELIP's, scaled to the depth.
        """
        base, settings = default_strategy(self.name, size), dict(self.settings)
        if schedule is not None and "schedule" in _kinds(self.name):
            settings = {"schedule": Schedule.parse(schedule)} | settings
        return replace(base, **settings)


def _kinds(name: str) -> dict[str, Any]:
    """The types of a strategy's settings, by name."""
    return {each.name: each.type for each in fields(STRATEGIES[name])}


def _value(name: str, key: str, text: str) -> Any:
    """What `text` writes for a setting: a number, several, a word, true, false or none."""
    kinds = _kinds(name)
    if key not in kinds:
        raise ValueError(f"expected a setting of {name!r}, one of {', '.join(kinds)}, got {key!r}")
    value: Any = text
    if text.lower() in WORDS:
        value = WORDS[text.lower()]
    elif re.fullmatch(r"[-+.\de]+(\s*,\s*[-+.\de]+)*,?", text):
        value = _number(key, text)
    if kinds[key] is bool and not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, got {text!r}")
    return value


def _number(key: str, text: str) -> int | float | tuple[int | float, ...]:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(f"{key}: expected a number, got {text!r}") from None
