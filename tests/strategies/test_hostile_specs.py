"""Strategies and schedules from hostile text and values: one short sentence, at once."""

import time

import pytest

from elip_models.strategies.schedule import Schedule
from elip_models.strategies.spec import get_strategy
from elip_models.towers.merge import check_merge
from elip_models.validation import check, did_you_mean, shortened

CASES = {
    "schedule, digits of others": (Schedule.parse, "٣(100%)"),
    "schedule, many groups": (Schedule.parse, "2(100%) " * 30_000),
    "schedule, more layers": (Schedule.parse, "9" * 10**6 + "(50%)"),
    "schedule, long": (Schedule.parse, "x" * 10**7),
    "schedule, rising": (Schedule.parse, f"1(50%) {'1(40%) ' * 1000}1(60%)"),
    "unknown": (get_strategy, "tomee" * 10**6),
    "options": (get_strategy, "tome:" + "r=1," * 10**6),
    "signs": (get_strategy, "tome:r=" + "-" * 10**5 + "1"),
    "digits of others": (get_strategy, "tome:r=٣"),
    "parentheses": (get_strategy, "elip:schedule=" + "(" * 10**6),
    "layers": (get_strategy, "evit:layers=" + ",".join("-1" for _ in range(10**5))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_text_is_one_sentence(name):
    read, hostile = CASES[name]
    start = time.monotonic()
    with pytest.raises((TypeError, ValueError), match=r"^[a-z_]+: expected") as error:
        read(hostile)
    assert len(str(error.value)) < (600 if read == Schedule.parse else 1000)
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
