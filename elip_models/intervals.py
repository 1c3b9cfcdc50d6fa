"""Confidence intervals of means: the percentile bootstrap, which resamples clusters of examples.

Examples that share an image are not independent: captions, or questions about it. They form a
cluster. A draw of the bootstrap has as many clusters as the data, drawn with replacement; its mean
is the mean over all examples of these clusters. If no draw differs, as at 0% and 100%, scores in
[0, 1] have the Wilson interval, with the number of clusters as the number of trials. The difference
of two shares of the same trials has an interval of its own, see `paired_interval`.

`scipy.stats.bootstrap` is the oracle of the tests. It is not used here, since the core does without
scipy, and since it draws each example: equal clusters are drawn together here, as a multinomial
count, so that the cost of 25,000 captions that are right or wrong is that of a few numbers.
Source: Davison and Hinkley (1997), section 3.8; Wilson (1927).
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
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


def interval_of_totals(
    rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> Interval:
    """Return the bootstrap interval of a statistic of the totals of drawn rows.

    `rows` (C, V) has one row for each cluster; `statistic` maps the totals of draws (R, V) to (R,).
    """
    # equal clusters have equal totals, but for the order in which these were summed
    _, first, counts = np.unique(rows.round(12), axis=0, return_index=True, return_counts=True)
    kinds = rows[first]
    rng, at_once = np.random.default_rng(seed), max(1, MAX_DRAWN_NUMBERS // len(counts))
    sizes = [min(at_once, RESAMPLES - first) for first in range(0, RESAMPLES, at_once)]
    shares = counts / counts.sum()
    drawn = [statistic(rng.multinomial(len(rows), shares, size) @ kinds) for size in sizes]
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(counts[None] @ kinds)[0]), float(low), float(high))


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[int] | np.ndarray | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Return the interval of the mean of any values, at least one.

    `clusters` are the numbers of the images of the examples. None: all examples are independent.
    """
    return _mean_over_clusters(scores, clusters, seed)[0]


def score_interval(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[int] | np.ndarray | None = None,
) -> Interval:
    """Return the interval of the mean of scores in [0, 1]; its width is never 0."""
    interval, count = _mean_over_clusters(scores, clusters, seed=0)
    return interval if interval.low < interval.high else wilson_interval(interval.mean, count)


def wilson_interval(share: float, count: float) -> Interval:
    """Return the Wilson interval of a share of `count` independent trials."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    total = count + z**2
    centre = (count * share + z**2 / 2) / total
    half = z * (count * share * (1 - share) + z**2 / 4) ** 0.5 / total
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def paired_interval(gains: int, losses: int, count: int) -> Interval:
    """Return the interval of the difference of two shares of the same trials.

    It is the adjusted Wald interval of Bonett and Price (2012), Adjusted Wald Confidence Interval
    for a Difference of Binomial Proportions Based on Paired Data. It holds its level when few
    trials differ, unlike the bootstrap.

    Args:
        gains: the trials that succeed in the first share alone.
        losses: the trials that succeed in the second share alone.
        count: all trials.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    gained, lost, total = (gains + 1) / (count + 2), (losses + 1) / (count + 2), count + 2
    centre = gained - lost
    half = z * ((gained + lost - centre**2) / total) ** 0.5
    return Interval((gains - losses) / count, max(-1.0, centre - half), min(1.0, centre + half))


def _mean_over_clusters(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[int] | np.ndarray | None,
    seed: int,
) -> tuple[Interval, int]:
    """Return the bootstrap interval of the mean, and the number of clusters."""
    if len(scores) == 0:
        raise ValueError("scores: expected one per example, got none")
    clusters = np.arange(len(scores)) if clusters is None else clusters
    _, clusters, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    sums = np.bincount(clusters, np.asarray(scores, dtype=np.float64))

    def mean(totals: np.ndarray) -> np.ndarray:
        return totals[:, 0] / totals[:, 1]

    return interval_of_totals(np.stack([sums, sizes], axis=1), mean, seed), len(sizes)
