"""The median of a few measurements with its interval, which needs scipy."""

from collections.abc import Sequence
from statistics import median

from scipy.stats import quantile_test

from elip_models.intervals import LEVEL

LEAST = 6
"""Measurements of an interval: the range of five has the median with less than 95% confidence."""


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the median, as `mean`, and the ends of its interval by order statistics."""
    interval = quantile_test(values, q=1.0, p=0.5).confidence_interval(LEVEL)
    ends = {"mean": median(values), "low": interval.low, "high": interval.high}
    return {end: round(float(value), 4) for end, value in ends.items()}
