"""The strategies by name. Each is frozen data, an argument of `encode_image` and `reduce_`: a name,
or an instance such as `ToMe(r=13)`.
"""

from dataclasses import MISSING, fields
from typing import Any

from elip_models.reduction.schedule import PRESETS, Schedule
from elip_models.reduction.strategies.adaptive import Adaptive
from elip_models.reduction.strategies.baselines import PatchDropout, Random, Trips
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategies.elip import Elip
from elip_models.reduction.strategies.evit import EViT
from elip_models.reduction.strategies.resize import Resize
from elip_models.reduction.strategies.tome import ToMe
from elip_models.reduction.strategy import Strategy
from elip_models.towers import Size

__all__ = [
    "STRATEGIES",
    "Adaptive",
    "Dense",
    "EViT",
    "Elip",
    "PatchDropout",
    "Random",
    "Resize",
    "ToMe",
    "Trips",
    "default_strategy",
    "get_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (Elip, EViT, ToMe, Trips, PatchDropout, Random, Resize, Adaptive)
}


def get_strategy(strategy: str | Strategy, **options: Any) -> Strategy:
    """The strategy of a name with `options`, those that are None left to its defaults.

    Raises:
        TypeError, ValueError: another name, an option that it does not take, or a bad value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(strategy, Strategy):
        if given:
            raise ValueError(
                f"{next(iter(given))}: expected it in the strategy, {strategy.name}(...), when one "
                f"is passed whole, got {next(iter(given.values()))!r} beside it"
            )
        return strategy
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(
            f"strategy: expected one of {list(STRATEGIES)} or a Strategy, got {strategy!r}"
        )
    cls = STRATEGIES[strategy]
    known = [field.name for field in fields(cls)]
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"{name}: expected none with strategy={strategy!r}, which takes "
                f"{', '.join(known)}, got {value!r}"
            )
    if "schedule" in known and "schedule" not in given:
        raise ValueError(
            f"schedule: expected one for strategy={strategy!r}, such as '{PRESETS['albef']}', got "
            "none"
        )
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    if needed:
        raise ValueError(
            f"{needed[0]}: expected one for strategy={strategy!r}, got none; pass the strategy "
            f"whole, {cls.__name__}({needed[0]}=..)"
        )
    return cls(**given)


def default_strategy(name: str, size: Size) -> Strategy:
    """The strategy as its paper runs it: ELIP's schedule scaled to the tower's depth; for `resize`,
    three quarters of the image's height."""
    cls = STRATEGIES[name]
    if cls is Resize:
        return cls(size.patch * round(0.75 * size.image[0] / size.patch))
    if "schedule" not in [field.name for field in fields(cls)]:
        return cls()
    return cls(schedule=Schedule.parse(PRESETS["albef"]).scaled(size.depth))
