"""Parameters of a test in three tiers, chosen by name: `pytest` runs the quick ones,
`pytest -m slow` the slow ones, and `pytest -m exhaustive` the rest."""

import pytest


def tiered(cases, quick, slow=()):
    """`cases` as parameters, a tuple for several arguments. Slow are the cases that cover what no
    quick one does; those that are neither quick nor slow are exhaustive."""
    cases, quick, slow = list(cases), list(quick), list(slow)
    unknown = [case for case in quick + slow if case not in cases]
    assert not unknown, f"quick and slow: expected some of the cases, got {unknown}"

    def marks(case):
        if case in quick:
            return ()
        return pytest.mark.slow if case in slow else pytest.mark.exhaustive

    return [pytest.param(*_values(case), marks=marks(case)) for case in cases]


def slow_except(quick, cases):
    """`cases` as parameters; those not in `quick` are slow."""
    cases = list(cases)
    return tiered(cases, quick, slow=cases)


def first_quick(cases, count=1):
    """`cases` as parameters; all but the first `count` are slow."""
    cases = list(cases)
    return slow_except(cases[:count], cases)


def _values(case):
    return case if isinstance(case, tuple) else (case,)
