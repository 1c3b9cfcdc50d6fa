"""Percentile bootstrap confidence intervals of scores."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
MAX_DRAWN_NUMBERS = 2**22  # numbers in memory


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray, *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of the mean over examples, at least one.

    Counts of distinct scores are drawn from a multinomial distribution. The cost therefore does not
    grow with the number of examples if scores take few values.
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
    """Return the percentile bootstrap interval of any statistic of drawn counts of V items.

    `statistic` maps R draws (R, V) to (R,); `counts` (V,) are the observed ones.
    """
    n = int(counts.sum())
    if n == 0:
        raise ValueError("scores: expected one per example, got none")
    rng, at_once = np.random.default_rng(seed), max(1, MAX_DRAWN_NUMBERS // len(counts))
    sizes = [min(at_once, RESAMPLES - first) for first in range(0, RESAMPLES, at_once)]
    drawn = [statistic(rng.multinomial(n, counts / n, size=size)) for size in sizes]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(counts[None])[0]), float(low), float(high))
