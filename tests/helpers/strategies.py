"""Test cases of all built-in strategies, so that a new one needs none of its own."""

from elip_models import STRATEGIES


def with_every_strategy(cases, leave_out=()):
    """Return the cases by name, and each strategy that has none, at its default rate.

    `cases` are instances by any name; `leave_out` are names of strategies that need no case.
    """
    named = {case.name for case in cases.values()} | set(leave_out)
    return cases | {name: cls() for name, cls in STRATEGIES.items() if name not in named}
