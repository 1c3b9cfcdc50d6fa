"""Bootstrap and Wilson intervals against worked examples, scipy's, and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from elip_models import intervals
from elip_models.intervals import (
    LEVEL,
    RESAMPLES,
    bootstrap_interval,
    group_mean_interval,
    score_interval,
    wilson_interval,
)

ENDS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


RANDOM = np.random.default_rng(1)
SCORES = {  # scores, and the number of the image of each
    "accuracy": (RANDOM.random(300) < 0.7, np.arange(300)),
    "soft": (RANDOM.choice([0.0, 0.3, 0.6, 0.9, 1.0], 300), np.arange(300)),
    "continuous": (RANDOM.random(300), np.arange(300)),
    "clusters": (RANDOM.random(600) < 0.6, np.repeat(np.arange(150), 4)),
    "uneven clusters": (RANDOM.random(600), np.sort(RANDOM.integers(0, 150, 600))),
}


@pytest.mark.parametrize("kind", SCORES)
def test_the_interval_equals_scipy(kind):
    scores, images = SCORES[kind]
    _, images = np.unique(images, return_inverse=True)
    expected = stats.bootstrap(
        (np.bincount(images, scores), np.bincount(images)),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(2),
    )
    interval = bootstrap_interval(scores, images)
    sigma = expected.standard_error
    density = stats.norm.pdf(stats.norm.ppf(ENDS[0])) / sigma  # of the means, at an end
    error = (2 * ENDS[0] * ENDS[1] / RESAMPLES) ** 0.5 / density  # of a difference of two draws
    step = {"accuracy": 1 / 300, "soft": 0.3 / 300, "clusters": 1 / 600}.get(kind, 0.0)
    assert interval.mean == pytest.approx(scores.mean(), abs=1e-12)
    for end, theirs in zip(interval[1:], expected.confidence_interval, strict=True):
        assert abs(end - theirs) <= 4 * error + step


def test_the_interval_is_deterministic_and_narrows_with_more_examples(monkeypatch):
    few, many = np.tile([0.0, 1.0], 50), np.tile([0.0, 1.0], 50 * 100)
    assert bootstrap_interval(few) == bootstrap_interval(few[::-1])
    widths = [interval.high - interval.low for interval in map(bootstrap_interval, (few, many))]
    assert widths[0] == pytest.approx(10 * widths[1], rel=0.15)
    scores = np.random.default_rng(1).random(40)
    expected = bootstrap_interval(scores)
    monkeypatch.setattr(intervals, "MAX_DRAWN_NUMBERS", 40 * 999)  # in several chunks
    assert bootstrap_interval(scores) == pytest.approx(expected)


def test_constant_scores_have_the_interval_of_wilson():
    assert bootstrap_interval([1.0] * 7) == (1.0, 1.0, 1.0)
    for hits, n in ((0, 7), (7, 7), (0, 500)):
        interval = score_interval([bool(hits)] * n)
        expected = stats.binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
        assert interval.mean == bool(hits)
        assert interval[1:] == pytest.approx(expected, abs=1e-12)
    low, high = score_interval([0.3])[1:]
    assert 0 < low < 0.3 < high < 1
    assert score_interval([1.0] * 40, np.arange(40) // 5) == wilson_interval(1.0, 8)
    assert score_interval([1.0, 0.0] * 20, np.arange(40) // 2) == wilson_interval(0.5, 20)


def test_the_interval_of_a_mean_over_groups():
    random = np.random.default_rng(0)
    sizes, shares = np.array([40, 400, 1000]), np.array([0.8, 0.5, 0.3])
    groups = np.repeat([7, 2, 5], sizes)
    scores = np.concatenate([np.arange(n) < n * p for n, p in zip(sizes, shares, strict=True)])
    interval = group_mean_interval(scores, groups)
    assert interval.mean == pytest.approx(shares.mean())
    half = 1.96 * (shares * (1 - shares) / sizes).sum() ** 0.5 / 3
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)
    order = random.permutation(len(scores))
    assert group_mean_interval(scores[order], groups[order]) == pytest.approx(interval)
    copies = np.tile(np.arange(len(scores)), 4)  # four scores of each image carry as much as one
    repeated = group_mean_interval(np.tile(scores, 4), np.tile(groups, 4), copies)
    assert repeated == pytest.approx(interval)
    halves = group_mean_interval([1, 0], [0, 1])  # of all draws, half have one group only
    assert halves == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_equal_groups_of_unequal_sizes_have_the_interval_of_fewer_trials(share):
    interval = group_mean_interval([share] * 110, [0] * 10 + [1] * 100)
    assert interval == wilson_interval(share, 4 / (1 / 10 + 1 / 100))
    assert group_mean_interval([share] * 20, [0, 1] * 10) == wilson_interval(share, 20)
