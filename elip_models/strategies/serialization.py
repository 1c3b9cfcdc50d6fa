"""Strategies as plain JSON, for the config of a saved model or a file beside it.

    {"version": 1, "strategy": "tome", "settings": {"r": 8, "proportional": true}}
    {"version": 1, "strategy": "mine.Alternating", "settings": {}}

`elip_models.calibrate` writes such a file, with its figures under a further key "calibration".

A schedule is stored as its text, with all digits, or as {"groups": text, "count_cls": true}. Of a
strategy that is not in this library only the class name is stored: pass the strategy when loading.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from elip_models.strategies import STRATEGIES
from elip_models.strategies.dense import Dense
from elip_models.strategies.schedule import Schedule
from elip_models.validation import PositiveInt, as_config_error, check, did_you_mean, shortened

VERSION = 1
NAMED = STRATEGIES | {Dense.name: Dense}
UPGRADE = "upgrade elip-kernels if a later one wrote it"


def settings_of(strategy: Any, named: Mapping[str, type] = NAMED) -> dict[str, Any]:
    """Return a strategy of the table `named` as plain JSON."""
    cls = type(strategy)
    if named.get(strategy.name) is not cls:
        name = f"{cls.__module__}.{cls.__qualname__}"
        return {"version": VERSION, "strategy": name, "settings": {}}
    settings = {field.name: _plain(getattr(strategy, field.name)) for field in fields(strategy)}
    return {"version": VERSION, "strategy": strategy.name, "settings": settings}


def strategy_of(saved: Any, named: Mapping[str, type] = NAMED) -> Any:
    """Return the strategy of the table `named` that `settings_of` stored.

    Raises:
        TypeError, ValueError: settings of a later version, or an unknown strategy, key or value.
    """
    check_stored(saved, known=("version", "strategy", "settings"))
    name, settings = saved.get("strategy"), saved.get("settings")
    check("strategy", name, str)
    check("settings", settings, dict)
    if name not in named:
        raise ValueError(
            f"strategy: expected one of {', '.join(named)}, got {shortened(name)}; pass an "
            f"instance of your own class as strategy=, or {UPGRADE}"
        )
    known = {field.name: field for field in fields(named[name])}
    _check_keys("settings.", settings, known=known)
    needed = (key for key, field in known.items() if field.default is MISSING)
    missing = next((key for key in needed if key not in settings), None)
    rate = getattr(named[name], "keep_field", None)
    if rate is not None and settings.get(rate) is None:
        missing = rate  # no default is stored, so that a stored strategy never changes
    if missing is not None:
        raise ValueError(
            f"settings.{missing}: expected one for {name!r}, got none; pass it as strategy=, such "
            f"as '{name}:{missing}=..'"
        )
    if isinstance(schedule := settings.get("schedule"), dict):
        settings = settings | {"schedule": _schedule(schedule)}
    with as_config_error("settings"):
        return named[name](**settings)


def check_stored(saved: Any, known: Iterable[str]) -> None:
    """Raise TypeError or ValueError for a later version of settings, or an unknown key of them."""
    check("settings", saved, dict)
    check("version", saved.get("version"), PositiveInt)
    if saved["version"] > VERSION:
        raise ValueError(
            f"version: expected at most {VERSION}, which this elip-kernels reads, got "
            f"{saved['version']}; upgrade elip-kernels"
        )
    _check_keys("", saved, known=known)


def read_strategy(path: str, named: Mapping[str, type] = NAMED) -> Any:
    """Return the strategy of the table `named` in a JSON file that `elip_models.calibrate` wrote.

    Raises:
        ValueError: there is no such file, or its content is not a strategy.
    """
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(saved, dict):
            saved.pop("calibration", None)
        return strategy_of(saved, named)
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"strategy: expected a file that `elip calibrate` wrote, got {shortened(path)}: {error}"
        ) from error


def _check_keys(prefix: str, values: dict[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError for an unknown key."""
    known = list(known)
    for key in values:
        if key not in known:
            close = did_you_mean(key, known)
            raise ValueError(
                f"{prefix}{key:.100}: expected keys among {', '.join(known)}, got "
                f"{shortened(key)}{close}; {UPGRADE}"
            )


def _plain(value: Any) -> Any:
    """Return a setting as JSON."""
    if not isinstance(value, Schedule):
        return list(value) if isinstance(value, tuple) else value
    flags = {field.name: getattr(value, field.name) for field in fields(value)[1:]}
    stored = {name: flag for name, flag in flags.items() if flag}
    return {"groups": value.exact} | stored if stored else value.exact


def _schedule(value: dict[str, Any]) -> Schedule:
    """Return the schedule of its text and flags."""
    _check_keys("settings.schedule.", value, known=[field.name for field in fields(Schedule)])
    flags = {name: flag for name, flag in value.items() if name != "groups"}
    return replace(Schedule.parse(value.get("groups")), **flags)
