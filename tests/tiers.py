"""Parameters of a test in two tiers: `pytest` runs the quick ones, `pytest -m slow` the others."""

import pytest


def tiered(cases, quick):
    """`cases` as parameters, a tuple for several arguments; all but those in `quick` are slow."""
    quick = list(quick)
    unknown = [case for case in quick if case not in list(cases)]
    assert not unknown, f"quick: expected some of the cases, got {unknown}"
    return [
        pytest.param(*_values(case), marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]


def _values(case):
    return case if isinstance(case, tuple) else (case,)
