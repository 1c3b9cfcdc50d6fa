"""Shares of a number of tokens, in integers alone."""

from fractions import Fraction

import pytest

from elip_models.strategies.shares import ceil_of, floor_of, nearest_to


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        (0.29, 100, (29, 29, 29)),  # the product of floats is 28.999999999999996
        (0.55, 100, (55, 55, 55)),  # 55.00000000000001
        (1 / 3, 9, (3, 3, 3)),
        (0.7, 196, (137, 138, 137)),
        (0.5, 7, (3, 4, 4)),
        (Fraction(1, 8), 4, (0, 1, 1)),
        (0.0, 5, (0, 0, 0)),
    ],
)
def test_a_share_is_rounded_from_its_exact_value(share, count, expected):
    assert (floor_of(share, count), ceil_of(share, count), nearest_to(share, count)) == expected
