"""Schedules: the paper's strings, their counts, and errors."""

import pytest

from elip_models import Schedule
from elip_models.strategies.schedule import Stage

PAPER = "2(100%) 2(90%) 6(65%) 2(40%)"
TABLE_8 = [
    "2(100%) 2(90%) 6(85%) 2(40%)",
    "6(100%) 6(40%)",
    "2(100%) 2(90%) 8(55%)",
    "4(100%) 4(50%) 4(50%)",
    PAPER,
    "2(100%) 2(90%) 6(40%) 2(40%)",
]


@pytest.mark.parametrize("text", TABLE_8)
def test_strings_of_table_8_round_trip(text):
    schedule = Schedule.parse(text)
    assert str(schedule) == text
    assert schedule.depth == 12
    assert Schedule.parse(schedule) is schedule


def test_kept_patches_and_stages_of_the_paper():
    schedule = Schedule.parse(PAPER)
    assert schedule.keep_counts(256) == [230, 166, 102]
    assert schedule.keep_counts(196) == [176, 127, 78]
    assert Schedule.parse(PAPER, count_cls=True).keep_counts(196) == [177, 128, 78]
    assert schedule.stages(256) == (Stage(2, 2, 230), Stage(4, 6, 166), Stage(10, 2, 102))
    assert Schedule.parse("12(100%)").stages(256) == ()


@pytest.mark.parametrize("depth", [1, 4, 11, 12, 24, 32])
def test_scaled_to_another_depth(depth):
    scaled = Schedule.parse(PAPER).scaled(depth)
    assert scaled.depth == depth
    ratios = [ratio for _, ratio in scaled.groups]
    assert ratios == ([0.65] if depth == 1 else [1.0, 0.9, 0.65, 0.4][-depth:])
    if depth == 24:
        assert str(scaled) == "4(100%) 4(90%) 12(65%) 4(40%)"


BAD = {
    "": "groups 'layers",
    "alibi": "groups 'layers.*albef",
    "0(100%) 12(40%)": "at least one layer.*0\\(100%\\)",
    "12(101%)": "ratio in \\(0%, 100%\\].*12\\(101%\\)",
    "2(100%) 4(50%) 6(60%)": "never rise.*6\\(60%\\) after 50%",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_strings_name_what_was_expected(text):
    with pytest.raises(ValueError, match=f"schedule: expected.*{BAD[text]}"):
        Schedule.parse(text)


def test_wrong_depth_suggests_the_scaled_string():
    with pytest.raises(ValueError, match=r"expected 24 layers.*got 12.*'4\(100%\) 4\(90%\)"):
        Schedule.parse(PAPER).for_depth(24)
