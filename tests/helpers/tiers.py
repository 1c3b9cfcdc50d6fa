"""Parameters of a test in three tiers: `pytest` runs the quick ones, `pytest -m slow` a sample of
the others, `pytest -m exhaustive` the rest."""

import pytest

SAMPLE = 24  # one in so many


def tiered(cases, quick):
    """`cases` as parameters, a tuple for several arguments. Of those not in `quick` the first is
    slow, and every twenty-fourth one behind it; the others are exhaustive."""
    cases, quick = list(cases), list(quick)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"quick: expected some of the cases, got {unknown}"
    further = [case for case in cases if case not in quick]
    marks = dict.fromkeys(range(len(cases)), ())
    for number, case in enumerate(further):
        tier = pytest.mark.slow if number % SAMPLE == 0 else pytest.mark.exhaustive
        marks[cases.index(case)] = tier
    return [pytest.param(*_values(case), marks=marks[i]) for i, case in enumerate(cases)]


def slow_except(quick, cases):
    """`cases` as parameters; those not in `quick` are slow."""
    return [
        pytest.param(*_values(case), marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]


def first_quick(cases, count=1):
    """`cases` as parameters; all but the first `count` are slow."""
    cases = list(cases)
    return slow_except(cases[:count], cases)


def _values(case):
    return case if isinstance(case, tuple) else (case,)
