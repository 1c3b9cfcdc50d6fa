"""Strategies from the arguments of `reduce_` and of the command line.

A strategy is written as one line: a name in `STRATEGIES`, then its settings.

    tome                                     at `DEFAULT_KEEP` of the tokens
    tome:r=13
    evit:keep_ratio=0.7,layers=3,6,9
    elip:scorer=exact,schedule=2(100%) 4(50%)
    calibrated/best.json                     a file that `elip calibrate` wrote
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

from elip_models.strategies import DEFAULT, STRATEGIES
from elip_models.strategies.elip import ELIP
from elip_models.strategies.elip_options import ELIPOptions
from elip_models.strategies.flops import check_share
from elip_models.strategies.serialization import read_strategy
from elip_models.strategies.strategy import Strategy
from elip_models.towers import Tower
from elip_models.validation import (
    Count,
    NonNegative,
    PositiveInt,
    PositiveShare,
    Rate,
    Reach,
    Share,
    did_you_mean,
    mismatch_error,
    plain_number,
    shortened,
)

SETTING = re.compile(r",\s*(?=\w+\s*=)")  # the commas that begin another setting
NUMBERS = re.compile(r"[-+.0-9e]+(\s*,\s*[-+.0-9e]+)*,?")
WORDS = {"true": True, "false": False, "none": None}
OTHER_NAMES = {
    "strategy": "algorithm|method|name|policy|strategies",
    "1 - keep": "sparsity|(drop|merge|prune|pruning|reduction)_(rate|ratio)",
    "keep": "budget|num_tokens|rate|ratio|(retain|retention|token)_ratio|(.+_)?keep(_.+)?",
}
"""Patterns of what other libraries call the arguments of `reduce_`, or the share they remove."""
S = TypeVar("S", bound=Strategy)


class StrategyOptions(ELIPOptions, total=False):
    """The options of all built-in strategies beside `schedule`, as keyword arguments.

    They include those of language models. Written by hand, because type checkers read no table:
    this is what editors complete and mypy checks. At run time the fields of the class decide.
    """

    r: Count | Rate | tuple[Count, ...] | None
    compare: Literal["mean_key", "keys", "tokens"] | None
    keep_norm: bool | None
    class_token_only: bool | None
    position: Literal["kept", "mean"] | None
    protect: Rate | None
    weight: float | None
    keep_ratio: PositiveShare | None
    layers: Literal["all"] | tuple[Count, ...] | None
    attention_gradient: bool | None
    until: Count | None
    size: PositiveInt | None
    decrease: Share | None
    reach: Reach | None
    relevance: bool | None
    contextual: Share | None
    tolerance: NonNegative | None
    layer: PositiveInt | None
    stages: PositiveInt | None


def resolve_strategy(
    tower: Tower,
    strategy: str | Strategy | None,
    options: Mapping[str, Any],
    *,
    keep: float | None,
    default: Callable[[], Strategy],
) -> Strategy:
    """Return the strategy that the arguments of `reduce_` describe, with its rate, for the tower.

    `options` include `schedule`; None as a value means not given. `default` returns the strategy if
    neither a strategy nor a schedule is given. It raises the errors of `reduce_`.
    """
    keep = check_share(keep)
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
    return fit_strategy(chosen, tower, keep)


def fit_strategy(strategy: S, tower: Tower, keep: float | None = None) -> S:
    """Return the strategy with its open settings set for this tower, the rate included.

    The rate is `keep`. Without it, it is that of the strategy's own option; if neither is set, it
    is `DEFAULT_KEEP`.
    """
    fitted = strategy.fitted(tower)
    return fitted.with_rate(tower.size) if keep is None else fitted.at_keep(tower, keep)


def get_strategy(strategy: str | Strategy, **options: Any) -> Strategy:
    """Return the strategy that a line of text describes, with `options` added to its settings.

    An option that is None leaves the setting of the text, or the strategy's default. An instance is
    returned unchanged and takes no options.

    Raises:
        TypeError, ValueError: an unknown name or setting, a wrong value, or a setting given twice.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if _is_file(strategy):
        strategy = read_strategy(strategy)
    if isinstance(strategy, Strategy):
        if options:
            name, value = next(iter(options.items()))
            raise ValueError(
                f"{name}: expected it inside the instance, {strategy.name}({name}=..), since a "
                f"Strategy instance takes no options, got {shortened(value)} beside it"
            )
        return strategy
    return from_line(strategy, options)


def from_line(line: str, options: Mapping[str, Any], table: Mapping[str, type] = STRATEGIES) -> Any:
    """Return the dataclass of `table` that a line describes, with `options` added to its settings.

    Raises:
        TypeError, ValueError: an unknown name or setting, a wrong value, or a setting given twice.
    """
    name, settings = parse_spec(line, table)
    known = option_types(name, table)
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"{key}: expected none with strategy={shortened(line)}, which takes "
                f"{', '.join(known)}, got {shortened(value)}{_what_was_meant(key, value, known)}"
            )
        if key in settings:
            raise ValueError(
                f"{key}: expected it once, got {shortened(value)} beside strategy={shortened(line)}"
            )
    return table[name](**settings, **options)


def _is_file(strategy: Any) -> bool:
    return isinstance(strategy, str) and strategy.endswith(".json")


def check_keep(
    strategy: str | Strategy, options: Mapping[str, Any], keep: float | None, *, name: str = "keep"
) -> None:
    """Raise ValueError if `keep` and the strategy's own option both set how many tokens stay.

    `options` stand beside `strategy`. A field of an instance counts as set if it differs from its
    default. `name` is the name of the target in the message.
    """
    if keep is None:
        return
    if _is_file(strategy):
        strategy = read_strategy(strategy)
    if isinstance(strategy, Strategy):
        own, settings = strategy.keep_field, {}
        for field in fields(strategy):
            if getattr(strategy, field.name) != field.default:
                settings[field.name] = getattr(strategy, field.name)
    else:
        name_of_strategy, settings = parse_spec(strategy)
        own, settings = STRATEGIES[name_of_strategy].keep_field, {**settings, **options}
    if settings.get(own) is not None:
        value = settings[own]
        value = value if isinstance(value, int | float | tuple) else str(value)
        raise ValueError(
            f"{name}: expected no {own} beside it, since both set how many tokens stay, got "
            f"{name}={shortened(keep)} and {own}={shortened(value)}; pass one of the two"
        )


def _check_no_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if there is an option: the default strategy takes none."""
    for name, value in options.items():
        owners = [key for key in STRATEGIES if name in option_types(key)]
        if not owners:
            known = {option for key in STRATEGIES for option in option_types(key)} | {"keep"}
            raise ValueError(
                f"{name}: expected an option of a strategy, got {name}={shortened(value)}"
                f"{_in_its_place(name, value) or did_you_mean(name, sorted(known))}"
            )
        reason = "is set by keep alone" if DEFAULT.name in owners else "has no such option"
        best = min(owners, key=lambda key: vars(STRATEGIES[key]).get("keep_field") != name)
        or_keep = ", or keep in its place" if STRATEGIES[best].keep_field == name else ""
        raise ValueError(
            f"{name}: expected a strategy beside it, since the default, {DEFAULT.name!r}, "
            f"{reason}, got {name}={shortened(value)}; strategies with it: "
            f"{', '.join(map(repr, owners))}. Pass strategy={best!r}{or_keep}"
        )


def _what_was_meant(name: str, value: Any, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown option: what to pass instead, if it is clear."""
    close = did_you_mean(name, known, cutoff=0.8)
    return close or _in_its_place(name, value, known) or did_you_mean(name, known)


def _in_its_place(name: str, value: Any, known: Iterable[str] = ()) -> str:
    """Return the end of an error about a name of other libraries: what `reduce_` calls it, or "".

    `known` are the options of the strategy; a `keep` among them may be a number of tokens.
    """
    arguments = (key for key, pattern in OTHER_NAMES.items() if re.fullmatch(pattern, name))
    argument, meaning = next(arguments, None), "the share of the tokens that stay"
    if argument is None:
        return ""
    value = plain_number(value)
    if argument == "strategy":
        return f"; pass strategy={shortened(value)}"
    if argument == "keep" and "keep" in known and isinstance(value, int):
        return f"; pass keep={value}"
    is_share = mismatch_error(value, PositiveShare) is None
    keep = round(1 - value, 6) if is_share and argument == "1 - keep" else value
    if not is_share or keep == 0:
        return f"; pass keep, {meaning}, such as keep=0.5"
    return f"; pass keep={keep}, {meaning}"


def parse_spec(text: str, table: Mapping[str, type] = STRATEGIES) -> tuple[str, dict[str, Any]]:
    """Return the name of a dataclass in `table`, and the settings, of 'NAME:key=value,..'.

    Raises:
        ValueError: an unknown name or setting.
    """
    is_strategy = table is STRATEGIES
    prefix, known = "strategy: " if is_strategy else "", ", ".join(table)
    or_instance = ", or a Strategy" if is_strategy else ""
    name = name_in(text)
    if name not in table:
        raise ValueError(
            f"{prefix}expected NAME or NAME:key=value,.. with {known}{or_instance}, got "
            f"{shortened(text)}{remedy_for(text, table)}"
        )
    _, colon, rest = (part.strip() for part in text.partition(":"))
    settings: dict[str, Any] = {}
    types = option_types(name, table)
    for setting in SETTING.split(rest) if colon else ():
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not key or not value:
            raise ValueError(
                f"{prefix}expected settings key=value in {shortened(text)}, got "
                f"{shortened(setting)}{remedy_for(_value(Any, name, setting), ())}"
            )
        if key in settings:
            raise ValueError(
                f"{prefix}expected {shortened(key)} once in {shortened(text)}, got it twice"
            )
        if key not in types:
            raise ValueError(
                f"{prefix}expected a setting of {name!r}, one of {', '.join(types)}, got "
                f"{shortened(key)}{_what_was_meant(key, _value(Any, key, value), types)}"
            )
        settings[key] = _value(types[key], key, value)
    return name, settings


def name_in(text: Any) -> str:
    """Return the name in 'NAME:key=value,..', or "" of a value that is no text."""
    return text.partition(":")[0].strip() if isinstance(text, str) else ""


def remedy_for(strategy: Any, table: Iterable[str]) -> str:
    """Return the end of an error about a value that is no strategy of `table`: what to pass."""
    if isinstance(strategy, type):
        return f"; pass an instance, {strategy.__name__}()"
    if isinstance(strategy, Real):
        return _in_its_place("keep", strategy)
    return did_you_mean(name_in(strategy), table)


def option_types(name: str, table: Mapping[str, type] = STRATEGIES) -> dict[str, Any]:
    """Return the types of the settings of a strategy, or of another dataclass in `table`."""
    return {field.name: field.type for field in fields(table[name])}


def _value(type_: Any, key: str, text: str) -> Any:
    """Return the value that `text` writes: a number, several, a word, true, false or none."""
    value: Any = text
    if text.lower() in WORDS and text not in get_args(type_):  # 'none' may be a choice
        value = WORDS[text.lower()]
    elif NUMBERS.fullmatch(text):
        value = _number(key, text)
    if type_ is bool and not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, got {shortened(text)}")
    return value


def _number(key: str, text: str) -> int | float | tuple[int | float, ...]:
    """Return the number or the tuple of numbers that `text` writes."""
    try:
        numbers = tuple(
            float(number) if {".", "e"} & {*number} else int(number)
            for number in text.removesuffix(",").split(",")
        )
    except ValueError:
        raise ValueError(f"{key}: expected a number, got {shortened(text)}") from None
    return numbers if "," in text else numbers[0]
