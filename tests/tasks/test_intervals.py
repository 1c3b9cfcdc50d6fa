"""Bootstrap intervals against worked examples and scipy's."""

import numpy as np
import pytest
from scipy import stats

from elip_models.tasks import intervals
from elip_models.tasks.intervals import LEVEL, RESAMPLES, bootstrap_interval

ENDS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


@pytest.mark.parametrize("right", [(4, 8), (10, 20), (180, 200)])
def test_the_interval_of_binary_scores_is_binomial(right):
    """An end is one of the binomial's that its share of draws, by four standard errors, may hit."""
    right, n = right
    interval = bootstrap_interval([True] * right + [False] * (n - right))
    assert interval.mean == right / n
    binomial, error = stats.binom(n, right / n), 4 * (ENDS[0] * ENDS[1] / RESAMPLES) ** 0.5
    for end, share in zip((interval.low, interval.high), ENDS, strict=True):
        first, last = binomial.ppf([share - error, share + error]) / n
        assert first <= end <= last


@pytest.mark.parametrize("kind", ["accuracy", "soft", "continuous"])
def test_the_interval_equals_scipy(kind):
    random, n = np.random.default_rng(1), 300
    scores = {
        "accuracy": random.random(n) < 0.7,
        "soft": random.choice([0.0, 0.3, 0.6, 0.9, 1.0], n),
        "continuous": random.random(n),
    }[kind]
    expected = stats.bootstrap(
        (scores,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    interval = bootstrap_interval(scores)
    sigma = scores.std() / n**0.5
    density = stats.norm.pdf(stats.norm.ppf(ENDS[0])) / sigma  # of the means, at an end
    error = (2 * ENDS[0] * ENDS[1] / RESAMPLES) ** 0.5 / density  # of a difference of two draws
    step = 1 / n if kind == "accuracy" else 0.3 / n if kind == "soft" else 0.0
    assert interval.mean == pytest.approx(scores.mean(), abs=1e-12)
    for end, theirs in zip(interval[1:], expected, strict=True):
        assert abs(end - theirs) <= 4 * error + step


def test_the_interval_is_deterministic_and_narrows_with_more_examples():
    few, many = np.tile([0.0, 1.0], 50), np.tile([0.0, 1.0], 50 * 100)
    assert bootstrap_interval(few) == bootstrap_interval(few[::-1])
    assert bootstrap_interval(few, seed=1) == bootstrap_interval(few, seed=1)
    widths = [interval.high - interval.low for interval in map(bootstrap_interval, (few, many))]
    assert widths[0] == pytest.approx(10 * widths[1], rel=0.15)
    narrow = bootstrap_interval(few, level=0.5)
    assert narrow.high - narrow.low < widths[0]


def test_the_interval_does_not_depend_on_the_chunk_size(monkeypatch):
    scores = np.random.default_rng(1).random(40)
    expected = bootstrap_interval(scores)
    monkeypatch.setattr(intervals, "MAX_DRAWN_NUMBERS", 40 * 999)
    assert bootstrap_interval(scores) == pytest.approx(expected)


def test_constant_scores_have_an_interval_of_zero_width():
    assert bootstrap_interval([1.0] * 7) == (1.0, 1.0, 1.0)
    assert bootstrap_interval([0.3]) == (0.3, 0.3, 0.3)


def test_no_score_is_an_error():
    with pytest.raises(ValueError, match="scores: expected one per example, got none"):
        bootstrap_interval([])
