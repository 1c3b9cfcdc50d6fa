"""The mean of scores with the interval that a bootstrap of the examples gives it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 1000
_AT_ONCE = 2**22


class Interval(NamedTuple):
    """A mean, and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def bootstrap(scores: Sequence[float], *, seed: int = 0) -> Interval:
    """Resample the examples 1,000 times: the percentiles of their means.

    Args:
        scores: of each example, at least one.
        seed: of the resampling.

    Raises:
        ValueError: no scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        raise ValueError("scores: expected at least one, got none")
    rng, n = np.random.default_rng(seed), len(values)
    rows = max(1, _AT_ONCE // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = np.concatenate([values[rng.integers(n, size=(size, n))].mean(1) for size in sizes])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
