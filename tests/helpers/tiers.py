"""Parameters of a test in two tiers: `pytest` runs the quick ones, `pytest -m slow` the others."""

import pytest


def tiered(cases, quick):
    """Thin out a product of arguments: the `quick` cases, and the fewest slow ones beside them.

    Each value of each argument is in one of both. Cases are tuples for several arguments.
    """
    cases, quick = list(cases), list(quick)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"quick: expected some of the cases, got {unknown}"
    slow, shown = [], set().union(*map(_named, quick))
    left = [(case, _named(case) - shown) for case in cases]
    while left := [(case, values - shown) for case, values in left if values - shown]:
        case, values = max(left, key=lambda each: len(each[1]))
        slow.append(case)
        shown |= values
    return slow_except(quick, [*quick, *slow])


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


def _named(case):
    """Return the values of a case with their arguments."""
    return set(enumerate(map(repr, _values(case))))
