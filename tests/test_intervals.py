"""Bootstrap and Wilson intervals against worked examples, scipy's, and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from elip_models import intervals
from elip_models.intervals import (
    LEVEL,
    RESAMPLES,
    bootstrap_interval,
    paired_interval,
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


def test_a_paired_interval_holds_its_level_when_few_trials_differ():
    count, chances = 372, (0.003, 0.008, 0.989)
    drawn = np.random.default_rng(0).multinomial(count, chances, size=4000)
    truth = chances[0] - chances[1]
    covers = [
        low <= truth <= high
        for gains, losses, _ in drawn
        for _, low, high in [paired_interval(gains, losses, count)]
    ]
    assert np.mean(covers) >= LEVEL
    mean, low, high = paired_interval(1, 3, 372)
    assert (mean, low, high) == pytest.approx((-2 / 372, -0.0182, 0.0075), abs=1e-4)
