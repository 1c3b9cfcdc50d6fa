"""Validation by type hints: accepted values, types of errors, and messages."""

import math
import sys
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
import pytest

from elip_kernels import _validate
from elip_models.pretraining.models.layers.text_reduction import TextReduction
from elip_models.pretraining.models.registry import CONFIGS
from elip_models.strategies import STRATEGIES
from elip_models.strategies.schedule import Schedule
from elip_models.validation import (
    Bounds,
    Count,
    Positive,
    PositiveInt,
    Share,
    below,
    check,
    check_fields,
    divisor_of,
    mismatch_error,
    plain_number,
)

Layers = Literal["all"] | tuple[Count, ...] | None


@pytest.mark.parametrize(
    ("hint", "fits", "out_of_range", "of_other_type"),
    [
        (PositiveInt, [1, sys.maxsize], [0, -1, 10**400], [True, 1.0, "1", None]),
        (Positive, [1, 0.5], [0, -1.0, math.nan, math.inf], [True, "0.5", None, 1j]),
        (Share, [0, 1, 0.5], [1.1, -0.1], [False, "1e-3"]),
        (bool, [True, False], [], [1, 0, "yes", None]),
        (Literal["a", "b"], ["a"], ["c"], [1, ["a"], None]),
        (Literal["a"] | PositiveInt, ["a", 2], ["b", 0], [True, 1.5]),
        (Layers, ["all", None, (), (1, 2)], ["any", (1, -1)], [[1], (1, "2"), 3]),
        (tuple[int, Share], [(1, 1)], [(1,), (1, 2), ()], [[1, 1], (1.0, 1)]),
        (dict[str, Positive], [{}, {"a": 1}], [{"a": 0}], [{"a": "1"}, []]),
    ],
)
def test_accepted_values_and_types_of_errors(hint, fits, out_of_range, of_other_type):
    assert [value for value in fits if mismatch_error(value, hint) is not None] == []
    assert [value for value in out_of_range if mismatch_error(value, hint) is not ValueError] == []
    assert [value for value in of_other_type if mismatch_error(value, hint) is not TypeError] == []


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (PositiveInt, 0, "x: expected an integer at least 1, got 0"),
        (Positive | None, "1", "x: expected a number above 0 or None, got '1'"),
        (Literal["a", "b"], "c", "x: expected one of 'a', 'b', got 'c'"),
        (Layers, -1, "x: expected 'all' or None or a tuple, each an integer at least 0, got -1"),
        (tuple[int, Share], (1, 2), "x: expected [an integer, a number in [0, 1]], got (1, 2)"),
        (str, list(range(1000)), "x: expected a string, got [0, 1, 2"),
    ],
)
def test_the_error_has_name_expected_and_got(hint, value, message):
    with pytest.raises((TypeError, ValueError)) as error:
        check("x", value, hint)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 300


@dataclass(frozen=True)
class Tower:
    """A dataclass with rules for single fields and for pairs."""

    width: PositiveInt = 12
    heads: Annotated[PositiveInt, divisor_of("width")] = 3
    split: Annotated[int, Bounds(1), below("heads")] = 2

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize("plain", [plain_number, _validate.plain_number])
def test_a_number_of_numpy_is_the_one_with_its_digits(plain):
    values = [np.float32(0.7), np.float16(0.1), np.int64(3), 0.7, True]
    assert [*map(plain, values)] == [0.7, 0.1, 3, 0.7, True]
    assert [*map(type, map(plain, values))] == [float, float, int, float, bool]
    for value in (np.bool_(True), "0.7", None, Fraction(1, 2)):
        assert plain(value) is value


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": 5}, ValueError, "^heads: expected a divisor of width = 12, got 5$"),
        ({"width": "12"}, TypeError, "^width: expected an integer at least 1, got '12'$"),
        ({"split": 3}, ValueError, "^split: expected an integer below heads = 3, got 3$"),
    ],
)
def test_fields_are_checked_by_their_annotations_and_by_rules_for_two(arguments, error, message):
    with pytest.raises(error, match=message):
        Tower(**arguments)
    assert hash(Tower()) == hash(replace(Tower(heads=4), heads=3))


EVERY = {name: strategy() for name, strategy in STRATEGIES.items()}
EVERY |= CONFIGS | {"text_reduction": TextReduction("post")}
EVERY |= {"schedule": Schedule.parse("clip")}


@pytest.mark.parametrize("name", EVERY)
def test_every_field_of_every_strategy_and_config_is_checked(name):
    for field in fields(EVERY[name]):
        with pytest.raises(TypeError, match=rf"(?s)^{field.name}: expected .*, got <object object"):
            replace(EVERY[name], **{field.name: object()})
