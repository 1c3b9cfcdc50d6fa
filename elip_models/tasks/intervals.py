"""How far a score on so many examples may be trusted: percentile bootstrap intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean, and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray, *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Find the percentile interval of a mean over examples, drawn anew with replacement.

    How often each distinct score is drawn is multinomial, so that the work does not grow with the
    number of examples where scores take few values, as right and wrong do.

    Args:
        scores: (N,), one an example, at least one.
        level: share of intervals made so that hold the mean of all examples.

    Returns:
        The same for the same seed.
    """
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    if n == 0:
        raise ValueError("scores: expected one an example, got none")
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    low, high = np.quantile(drawn @ values / n, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(counts @ values / n), float(low), float(high))
