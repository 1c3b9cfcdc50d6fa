"""How far a score on so many examples may be trusted: percentile bootstrap intervals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
DRAWN_AT_ONCE = 2**22  # numbers


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
    return interval_of(lambda drawn: drawn @ values / len(scores), counts, level=level, seed=seed)


def interval_of(
    statistic: Callable[[np.ndarray], np.ndarray],
    counts: np.ndarray,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Find the percentile interval of any statistic of how often each thing is drawn.

    Args:
        statistic: (R, V), R draws of V things -> (R,).
        counts: (V,), how often each thing is there.
        level, seed: as of `bootstrap_interval`.
    """
    n = int(counts.sum())
    if n == 0:
        raise ValueError("scores: expected one an example, got none")
    rng, at_once = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // len(counts))
    sizes = [min(at_once, RESAMPLES - first) for first in range(0, RESAMPLES, at_once)]
    drawn = [statistic(rng.multinomial(n, counts / n, size=size)) for size in sizes]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(counts[None])[0]), float(low), float(high))
