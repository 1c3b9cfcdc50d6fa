"""Strategies and schedules from hostile text and values: one short sentence, at once."""

import time

import pytest

from elip_models.reduction.schedule import Schedule
from elip_models.reduction.strategy_spec import get_strategy
from elip_models.towers.merge import check_merge
from elip_models.validation import check, did_you_mean, shortened

SCHEDULES = {
    "digits of others": ("٣(100%)", "schedule: expected groups"),
    "many groups": ("2(100%) " * 30_000, "schedule: expected at most 1024 layers, got 60000"),
    "more layers": ("9" * 10**6 + "(50%)", "schedule: expected groups"),
    "long": ("x" * 10**7, "schedule: expected groups"),
    "rising": (f"1(50%) {'1(40%) ' * 1000}1(60%)", "schedule: expected ratios that never rise"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_hostile_schedule_is_one_sentence(name):
    text, said = SCHEDULES[name]
    start = time.monotonic()
    with pytest.raises(ValueError, match=said) as error:
        Schedule.parse(text)
    assert len(str(error.value)) < 600
    assert time.monotonic() - start < 10


SPECS = {
    "unknown": "tomee" * 10**6,
    "options": "tome:" + "r=1," * 10**6,
    "signs": "tome:r=" + "-" * 10**5 + "1",
    "digits of others": "tome:r=٣",
    "parentheses": "elip:schedule=" + "(" * 10**6,
    "layers": "evit:layers=" + ",".join("-1" for _ in range(10**5)),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_hostile_strategy_is_one_sentence(name):
    start = time.monotonic()
    with pytest.raises((TypeError, ValueError), match=r"^[a-z_]+: expected") as error:
        get_strategy(SPECS[name])
    assert len(str(error.value)) < 1000
    assert time.monotonic() - start < 10


DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]
WIDE = [["x" * 1000] * 1000] * 1000
VALUES = {
    "long text": "x" * 10**7,
    "wide": WIDE,
    "deep": DEEP,
}


@pytest.mark.parametrize("name", VALUES)
def test_a_message_quotes_the_beginning_of_a_value(name):
    value, start = VALUES[name], time.monotonic()
    assert len(shortened(value)) <= 200
    with pytest.raises(TypeError, match=r"^a: expected") as error:
        check("a", value, float | None)
    assert len(str(error.value)) < 300
    for call in (lambda: check_merge(value), lambda: get_strategy("tome", r=value)):
        with pytest.raises((TypeError, ValueError), match="expected") as error:
            call()
        assert len(str(error.value)) < 600
    assert did_you_mean(value, ["dense"]) == ""
    assert time.monotonic() - start < 10
