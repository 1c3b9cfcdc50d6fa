"""The choice of a setting: halves, paired intervals, and how often a claim is wrong."""

from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from elip_models.calibration.calibrate import TESTED
from elip_models.calibration.choice import (
    difference,
    fixed_sequence,
    images_needed,
    is_within,
    may_be_within,
    split,
)
from elip_models.calibration.task import Measure, ratio
from elip_models.intervals import LEVEL, RESAMPLES, Interval, paired_interval

RANDOM = np.random.default_rng(0)


def measure(right, of=1.0, statistic=ratio):
    """The measure of `right` of `of` examples in each image."""
    right = np.asarray(right, dtype=np.float64)
    return Measure(np.stack([right, np.broadcast_to(of, right.shape)], axis=1), statistic)


@pytest.mark.parametrize("count", [2, 9, 1000])
def test_halves_have_each_image_once(count):
    chosen_on, held_back = split(count, None, seed=0)
    assert sorted(chosen_on + held_back) == list(range(count))
    assert list(chosen_on) == sorted(chosen_on) and list(held_back) == sorted(held_back)
    assert len(chosen_on) - len(held_back) == count % 2


def test_halves_have_the_same_shares_of_each_group():
    groups = RANDOM.integers(0, 20, 333)
    parts = split(333, groups.tolist(), seed=3)
    first, second = (np.bincount(groups[list(part)], minlength=20) for part in parts)
    assert abs(first - second).max() <= 1
    assert len(parts.chosen_on) == 167


def test_a_share_has_its_part_of_each_group_and_is_in_every_larger_one():
    groups = np.repeat([0, 1, 2], [100, 40, 6])
    quarter, half = (
        {i for part in split(146, groups, seed=0, share=s) for i in part} for s in (0.25, 0.5)
    )
    assert np.bincount(groups[sorted(quarter)]).tolist() == [25, 10, 2]
    assert quarter < half
    least = split(146, groups, seed=0, share=0.25, least=20)
    assert np.bincount(groups[[i for part in least for i in part]]).tolist() == [25, 20, 6]


def test_a_split_is_drawn_by_its_seed():
    assert split(50, None, seed=1) == split(50, None, seed=1) != split(50, None, seed=2)


def test_a_difference_of_right_and_wrong_is_that_of_bonett_and_price():
    dense, reduced = np.array([*product((0, 1), (0, 1))] * 25).T[:, :83]
    both = difference(measure(reduced), measure(dense))
    gains, losses = int((reduced > dense).sum()), int((reduced < dense).sum())
    assert both == paired_interval(gains, losses, 83)
    rows = np.concatenate([reduced - dense, [1, -1]])  # of the adjusted shares
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * rows.std() / len(rows) ** 0.5
    assert both[1:] == pytest.approx((rows.mean() - half, rows.mean() + half), abs=1e-12)
    assert both.mean == pytest.approx(reduced.mean() - dense.mean())


@pytest.mark.parametrize("of", [1.0, RANDOM.integers(1, 6, 200)])
def test_a_difference_of_other_measures_equals_the_bootstrap_of_scipy(of):
    dense = RANDOM.random(200) * of
    reduced = dense * RANDOM.random(200) ** 0.1
    interval = difference(measure(reduced, of), measure(dense, of))
    expected = stats.bootstrap(
        (reduced, dense, np.broadcast_to(of, 200)),
        lambda a, b, of, axis: (a.sum(axis) - b.sum(axis)) / of.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    assert interval.mean == pytest.approx((reduced - dense).sum() / np.sum(of * np.ones(200)))
    error = 0.1 * expected.standard_error
    assert interval[1:] == pytest.approx(tuple(expected.confidence_interval), abs=error)


def test_a_statistic_that_is_no_share_is_not_taken_for_one():
    dense, reduced = measure([1, 1, 0, 1] * 9), measure([1, 0, 0, 1] * 9)

    def square(totals):
        return ratio(totals) ** 2

    squares = [each._replace(statistic=square) for each in (reduced, dense)]
    assert difference(*squares).mean == pytest.approx(0.5**2 - 0.75**2)


def test_equal_outcomes_have_an_interval_that_is_not_zero_wide():
    scores = measure(RANDOM.random(40))
    assert difference(scores, scores) == paired_interval(0, 0, 40)


def test_a_difference_of_other_images_is_an_error():
    with pytest.raises(ValueError, match=r"got shapes \(3, 2\) and \(4, 2\)\. Measure both"):
        difference(measure([1, 0, 1]), measure([1, 0, 1, 1]))


def test_the_lower_end_decides():
    assert is_within(Interval(0.0, -0.0099, 0.0099), 0.01)
    assert not is_within(Interval(0.0, -0.01, 0.5), 0.01)


def test_the_number_of_images_narrows_the_interval_to_the_tolerance():
    interval = paired_interval(12, 14, 400)
    needed = images_needed(interval, 400, 0.02)
    assert needed > 400 and not is_within(interval, 0.02)
    for factor, expected in ((0.9, False), (1.1, True)):
        count = factor * needed
        more = paired_interval(round(12 * count / 400), round(14 * count / 400), round(count))
        assert is_within(more, 0.02) is expected
    assert images_needed(paired_interval(12, 14, 4000), 4000, 0.02) <= 4000
    assert images_needed(Interval(-0.02, -0.03, -0.01), 400, 0.02) is None


@pytest.mark.parametrize(
    ("mean", "half", "may"),
    [
        (0, 0.03, True),
        (0, 0.12, False),
        (0.02, 0.12, True),
        (-0.02, 0.03, True),
        (-0.1, 0.03, False),
    ],
)
def test_few_images_show_what_cannot_be_within_on_all(mean, half, may):
    interval = Interval(mean, mean - half, mean + half)
    assert may_be_within(interval, 50, 500, 0.02) is may


def test_settings_are_tested_in_order_until_one_fails():
    assert fixed_sequence([5, 4, 3, 2], lambda setting: setting > 3) == ([5, 4, 3], 4)
    assert fixed_sequence([3, 5], lambda setting: setting > 3) == ([3], None)
    assert fixed_sequence([], bool) == ([], None)


TOLERANCE = 0.03
TIMES = np.linspace(0.95, 0.40, 12)
LOSSES = {  # of top-1, by setting, from the slowest to the fastest
    "on both sides": np.linspace(0.002, 0.06, 12),
    "many at the tolerance": [0.01, 0.02, *[0.031] * 10],
}
CALIBRATIONS = 250  # of each kind and number of images


def outcomes(generator, losses, accuracy, count):
    """Which images the dense model and each setting get right, with exactly these mean losses.

    An image is right if its margin is positive. Settings change the margin together and alone.
    """
    normal = NormalDist()
    margins = generator.normal(normal.inv_cdf(accuracy), 1, count)
    spread = np.linspace(0.1, 0.5, len(losses))[:, None]
    shared, alone = generator.normal(size=count), generator.normal(size=(len(losses), count))
    wanted = np.array([[normal.inv_cdf(accuracy - loss)] for loss in losses])
    shift = wanted * (1 + spread**2) ** 0.5 - normal.inv_cdf(accuracy)
    changed = margins + shift + spread * (0.7**0.5 * shared + 0.3**0.5 * alone)
    return margins > 0, changed > 0


def within(dense, reduced):
    """The numbers of the settings within the tolerance on these images, the fastest first."""
    reference = measure(dense)
    return [
        setting
        for setting in np.argsort(TIMES)
        if is_within(difference(measure(reduced[setting]), reference), TOLERANCE)
    ]


@pytest.mark.slow
def test_a_confirmed_choice_is_wrong_in_at_most_5_percent_and_an_unconfirmed_one_more_often():
    generator = np.random.default_rng(0)
    right, wrong = {"held back": 0, "not": 0}, {"held back": 0, "not": 0}
    for losses, (count, accuracy) in product(LOSSES.values(), ((400, 0.7), (1000, 0.85))):
        for seed in range(CALIBRATIONS):
            dense, reduced = outcomes(generator, losses, accuracy, count)
            chosen_on, held_back = map(list, split(count, None, seed=seed))
            fastest = within(dense[chosen_on], reduced[:, chosen_on])[:TESTED]
            confirmed = within(dense[held_back], reduced[:, held_back])
            _, setting = fixed_sequence(fastest[::-1], confirmed.__contains__)
            claimed = {"held back": setting, "not": next(iter(within(dense, reduced)), None)}
            for rule, setting in claimed.items():
                if setting is not None:
                    bad = losses[setting] > TOLERANCE
                    right[rule] += not bad
                    wrong[rule] += bad
    claims = {rule: wrong[rule] + right[rule] for rule in wrong}
    shares = {rule: wrong[rule] / claims[rule] for rule in wrong}
    message = (
        f"claims that are wrong: {shares['held back']:.1%} of {claims['held back']} confirmed on "
        f"images held back, {shares['not']:.1%} of {claims['not']} by the images that chose"
    )
    assert shares["held back"] <= 0.05 < shares["not"], message
