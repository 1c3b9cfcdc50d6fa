"""Confidence intervals of means: the percentile bootstrap, which resamples clusters of examples.

Examples that share an image are not independent: captions, or questions about it. They form a
cluster. A draw of the bootstrap has as many clusters as the data, drawn with replacement; its mean
is the mean over all examples of these clusters.

    mean of a draw   sum_c n_c sum(scores of c) / sum_c n_c size(c),   n multinomial

If all clusters have the same mean score, as at 0% and 100%, the bootstrap has no width. Scores in
[0, 1] then have the Wilson interval, with the number of clusters as the number of trials.
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


def score_interval(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[int] | np.ndarray | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the interval of the mean of scores in [0, 1]; its width is never 0.

    Args:
        scores: Scores of the examples, at least one.
        clusters: Number of the image of each example. None: all examples are independent.
        level: Share of intervals that contain the true mean.
        seed: Seed of the draws.

    Raises:
        ValueError: There is no score, or one is outside [0, 1].
    """
    values = _checked(scores)
    interval = bootstrap_interval(values, clusters, level=level, seed=seed)
    if interval.low < interval.high:
        return interval
    count = len(values) if clusters is None else len(np.unique(clusters))
    return wilson_interval(interval.mean, count, level=level)


def group_mean_interval(
    scores: Sequence[float] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    clusters: Sequence[int] | np.ndarray | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the interval of the mean over groups of the mean score of each group.

    A draw averages the groups that it contains. The Wilson interval, see the top of this file, has
    G^2 / sum_g (1 / n_g) trials for G groups of n_g clusters each. For `groups`, a number for each
    example, and the other arguments, see `score_interval`.
    """
    values, (_, groups) = _checked(scores), np.unique(groups, return_inverse=True)
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    _, clusters = np.unique(clusters, return_inverse=True)
    # sums and sizes of clusters in groups
    table = np.zeros((2, clusters.max() + 1, groups.max() + 1))
    np.add.at(table, (0, clusters, groups), values)
    np.add.at(table, (1, clusters, groups), 1)
    rows = np.concatenate([table[0].round(12), table[1]], axis=1)
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    sums, sizes = np.split(kinds, 2, axis=1)

    def mean(drawn: np.ndarray) -> np.ndarray:
        totals = drawn @ sizes
        means = np.divide(drawn @ sums, totals, where=totals > 0, out=np.full(totals.shape, np.nan))
        return np.nanmean(means, axis=1)

    interval = interval_of(mean, counts, level=level, seed=seed)
    if interval.low < interval.high:
        return interval
    trials = (table[1] > 0).sum(axis=0)
    effective = len(trials) ** 2 / float((1 / trials).sum())
    return wilson_interval(interval.mean, effective, level=level)


def wilson_interval(share: float, count: float, *, level: float = LEVEL) -> Interval:
    """Return the Wilson interval of a share of `count` independent trials."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    total = count + z**2
    centre = (count * share + z**2 / 2) / total
    half = z * (count * share * (1 - share) + z**2 / 4) ** 0.5 / total
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[int] | np.ndarray | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of the mean of any values, at least one.

    Counts of distinct clusters are drawn from a multinomial distribution. The cost therefore does
    not grow with the number of examples if scores take few values. For `clusters`, see
    `score_interval`.
    """
    values = np.asarray(scores, dtype=np.float64)
    if clusters is None:
        rows = np.stack([values, np.ones(len(values))], axis=1)
    else:
        _, numbers = np.unique(np.asarray(clusters), return_inverse=True)
        sums, sizes = np.bincount(numbers, values), np.bincount(numbers)
        rows = np.stack([sums.round(12), sizes], axis=1)  # equal clusters, summed in any order
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    sums, sizes = kinds.T
    return interval_of(
        lambda drawn: (drawn @ sums) / (drawn @ sizes), counts, level=level, seed=seed
    )


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


def _checked(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"scores: expected values in [0, 1], got {values.min()} to {values.max()}")
    return values
