"""Bootstrap and Wilson intervals against worked examples, scipy's, and simulated coverage."""

import numpy as np
import pytest
import torch
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
from elip_models.pretraining.tasks.retrieval import recall_intervals
from tests.helpers.tiers import tiered

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


def test_constant_values_have_a_bootstrap_interval_of_zero_width():
    assert bootstrap_interval([1.0] * 7) == (1.0, 1.0, 1.0)
    assert bootstrap_interval([0.3]) == (0.3, 0.3, 0.3)


def test_no_score_is_an_error():
    with pytest.raises(ValueError, match="scores: expected one per example, got none"):
        bootstrap_interval([])


def test_constant_scores_have_the_interval_of_wilson():
    for hits, n in ((0, 7), (7, 7), (0, 500)):
        found = score_interval([bool(hits)] * n)
        expected = stats.binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
        assert found.mean == bool(hits)
        assert found[1:] == pytest.approx(expected, abs=1e-12)
    low, high = score_interval([0.3])[1:]
    assert 0 < low < 0.3 < high < 1
    images = np.arange(40) // 5
    assert score_interval([1.0] * 40, images) == wilson_interval(1.0, 8)
    assert score_interval([1.0, 0.0] * 20, np.arange(40) // 2) == wilson_interval(0.5, 20)


def test_a_score_outside_0_and_1_is_an_error():
    with pytest.raises(ValueError, match=r"scores: expected values in \[0, 1\], got 0.5 to 1.5"):
        score_interval([0.5, 1.5])


def test_clusters_are_drawn_whole():
    """Copies of each example add no information; single examples are clusters of one."""
    scores = np.random.default_rng(1).choice([0.0, 0.3, 1.0], 200)
    alone = score_interval(scores)
    assert score_interval(scores, np.arange(200)[::-1]) == pytest.approx(alone)
    copies = score_interval(np.repeat(scores, 5), np.repeat(np.arange(200), 5))
    assert copies == pytest.approx(alone)
    wrong = score_interval(np.repeat(scores, 5))
    assert wrong.high - wrong.low == pytest.approx((alone.high - alone.low) / 5**0.5, rel=0.05)


def test_clusters_of_several_sizes_equal_the_bootstrap_of_scipy():
    random = np.random.default_rng(3)
    sizes = random.integers(1, 8, 150)
    images = np.repeat(np.arange(150), sizes)
    scores = (random.random(len(images)) < random.random(150)[images]).astype(float)
    sums = np.bincount(images, scores)
    expected = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(2),
    )
    found = score_interval(scores, images)
    assert found.mean == pytest.approx(scores.mean(), abs=1e-12)
    sigma = expected.standard_error
    density = stats.norm.pdf(stats.norm.ppf(ENDS[0])) / sigma
    error = (2 * ENDS[0] * ENDS[1] / RESAMPLES) ** 0.5 / density
    for end, theirs in zip(found[1:], expected.confidence_interval, strict=True):
        assert abs(end - theirs) <= 4 * error


@pytest.mark.parametrize("correlation", tiered([0.3, 0.5], [], slow=[0.3]))
def test_the_interval_of_recall_covers_the_true_one_with_correlated_captions(correlation):
    """500 images of five captions: the recall of an image's captions is beta distributed.

    The share of 1,000 intervals that cover has a standard error of 0.7 points. Intervals that
    ignore images cover 80% or less.
    """
    recall, runs, images, random = 0.6, 1000, 500, np.random.default_rng(7)
    owners = torch.arange(images).repeat_interleave(5)
    spread = 1 / correlation - 1  # a + b of the beta distribution with this correlation
    covered, ignored = 0, 0
    for _ in range(runs):
        of_image = random.beta(recall * spread, (1 - recall) * spread, images)
        hits = torch.from_numpy(random.random(5 * images) < of_image[owners.numpy()])
        ranks = (~hits).long()
        found = recall_intervals(ranks[::5], ranks, owners, ks=(1,))["text_to_image_r1"]
        covered += found.low <= recall <= found.high
        alone = score_interval(hits.numpy())
        ignored += alone.low <= recall <= alone.high
    assert 0.93 <= covered / runs <= 0.97
    assert ignored / runs < 0.85


def test_the_interval_of_a_mean_over_groups():
    random = np.random.default_rng(0)
    sizes, shares = np.array([40, 400, 1000]), np.array([0.8, 0.5, 0.3])
    groups = np.repeat([7, 2, 5], sizes)
    scores = np.concatenate([np.arange(n) < n * p for n, p in zip(sizes, shares, strict=True)])
    found = group_mean_interval(scores, groups)
    assert found.mean == pytest.approx(shares.mean())
    half = 1.96 * (shares * (1 - shares) / sizes).sum() ** 0.5 / 3
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    order = random.permutation(len(scores))
    assert group_mean_interval(scores[order], groups[order]) == pytest.approx(found)
    copies = np.tile(np.arange(len(scores)), 4)  # four scores of each image carry as much as one
    repeated = group_mean_interval(np.tile(scores, 4), np.tile(groups, 4), copies)
    assert repeated == pytest.approx(found)


def test_the_mean_over_one_group_is_that_of_all_scores():
    random = np.random.default_rng(1)
    scores, clusters = random.random(50) < 0.4, random.integers(0, 20, 50)
    assert group_mean_interval(scores, [3] * 50, clusters) == score_interval(scores, clusters)


def test_draws_without_a_group_average_the_others():
    found = group_mean_interval([1, 0], [0, 1])  # of all draws, half have one group only
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_equal_groups_of_unequal_sizes_have_the_interval_of_fewer_trials(share):
    found = group_mean_interval([share] * 110, [0] * 10 + [1] * 100)
    assert found == wilson_interval(share, 4 / (1 / 10 + 1 / 100))
    assert group_mean_interval([share] * 20, [0, 1] * 10) == wilson_interval(share, 20)
    with pytest.raises(ValueError, match=r"scores: expected values in \[0, 1\]"):
        group_mean_interval([share + 2], [0])
