"""Test cases of all built-in strategies, so that a new one needs none of its own."""

from elip_models import ELIP, STRATEGIES, TRIPS, EViT, ImageResize, ToMe
from tests.helpers.towers import SCHEDULE


def with_every_strategy(cases, leave_out=()):
    """Return the cases by name, and each strategy that has none, at its default rate.

    `cases` are instances by any name; `leave_out` are names of strategies that need no case.
    """
    named = {case.name for case in cases.values()} | set(leave_out)
    return cases | {name: cls() for name, cls in STRATEGIES.items() if name not in named}


_VISION = {"schedule": SCHEDULE, "without_text": "vision"}
WITHOUT_TEXT = with_every_strategy(
    {
        **{f"elip {s}": ELIP(**_VISION, scorer=s) for s in ("last", "cls", "exact", "official", 1)},
        "evit": EViT(0.7, layers=(1, 3)),
        "evit every layer": EViT(0.8, layers="all", attention_gradient=False),
        "nearest": ELIP(**_VISION, merge="nearest"),
        "resize": ImageResize(32),
        "tome": ToMe(4),
        "tome list": ToMe((0, 5, 0, 3, 2, 20), proportional=False),
        "trips": TRIPS(**_VISION),
    }
)
"""Strategies that the image alone guides, in a tower of `tests.helpers.towers`."""
