"""Choose a setting on one part of the images, and judge it on the other.

The fastest of many settings is a lucky one: its own interval on the images that chose it promises
too much. So half of the images choose, and the other half tests the fastest settings, in an order
that the first half has fixed.

A setting is non-inferior if the lower end of the 95% interval of its difference from the dense
model, paired by image, is above minus the tolerance. A setting that loses the tolerance or more
passes with a probability of at most 2.5%. Source: Piaggio et al. (2012), the extension of the
CONSORT statement to non-inferiority trials. Several tests in a fixed order, each only after the one
before has passed, have together the error rate of one test. Source: Maurer et al. (1995),
Multiple comparisons in drug clinical trials and preclinical assays.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np

from elip_models.calibration.task import Measure, ratio
from elip_models.intervals import LEVEL, Interval, interval_of_totals, paired_interval

T = TypeVar("T")
SLACK = 0.7  # few images tell the width of an interval badly


class Parts(NamedTuple):
    """The numbers of the images of each part, ascending."""

    chosen_on: tuple[int, ...]
    held_back: tuple[int, ...]


def split(
    count: int, groups: Sequence[int] | None, *, seed: int, share: float = 1.0, least: int = 0
) -> Parts:
    """Return two random halves of images 0 .. `count` - 1, or of a share of them.

    Args:
        count: all images; of an odd number the first part has one more.
        groups: a number for each image; each half has half of the images of each number, or one
            more. None: all images are one group.
        seed: of the draw.
        share: of the images of each group that is used; of a larger share all are used again.
        least: the number of images of a group that are used at least, if there are as many.
    """
    group_of = np.zeros(count, int) if groups is None else np.asarray(groups)
    drawn = np.random.default_rng(seed).permutation(count)
    drawn = drawn[np.argsort(group_of[drawn], kind="stable")]
    ordered = group_of[drawn]
    first, last = (np.searchsorted(ordered, ordered, side) for side in ("left", "right"))
    drawn = drawn[np.arange(count) - first < np.maximum(least, np.ceil(share * (last - first)))]
    halves = (np.sort(drawn[first::2]).tolist() for first in (0, 1))
    return Parts(*map(tuple, halves))


def difference(reduced: Measure, dense: Measure) -> Interval:
    """Return a measure of the reduced model minus that of the dense one, on the same images.

    The interval is that of `paired_interval` if each image is right or wrong, which holds its level
    when few images differ; else the percentile bootstrap of images. If no image differs, it is that
    of `paired_interval`, whose width is never 0.

    Args:
        reduced: the totals of each image for the reduced model.
        dense: those for the dense model, row by row of the same images.

    Raises:
        ValueError: the two measures have other numbers of images or of totals.
    """
    if reduced.rows.shape != dense.rows.shape:
        raise ValueError(
            "`reduced` and `dense` must have rows of the same images, got shapes "
            f"{reduced.rows.shape} and {dense.rows.shape}. Measure both models on the same images."
        )
    if (_is_share(reduced) and _is_share(dense)) or (reduced.rows == dense.rows).all():
        gaps = (reduced.rows - dense.rows)[:, 0]
        return paired_interval(int((gaps > 0).sum()), int((gaps < 0).sum()), len(gaps))
    width = reduced.rows.shape[1]

    def gap(totals: np.ndarray) -> np.ndarray:
        return reduced.statistic(totals[:, :width]) - dense.statistic(totals[:, width:])

    return interval_of_totals(np.hstack([reduced.rows, dense.rows]), gap)


def is_within(interval: Interval, tolerance: float) -> bool:
    """Return whether a setting with this difference from dense is non-inferior."""
    return interval.low > -tolerance


def may_be_within(interval: Interval, count: int, total: int, tolerance: float) -> bool:
    """Return whether a setting may be within the tolerance on all images, by a part of them.

    It may if its interval on all images would be within, with a difference that is one standard
    error nearer to 0, and an interval that is narrower than expected by the factor `SLACK`.

    Args:
        interval: the difference from dense on the part.
        count: the images of the part.
        total: all images.
        tolerance: the largest loss.
    """
    half = interval.mean - interval.low
    error = half / NormalDist().inv_cdf((1 + LEVEL) / 2)
    mean = max(interval.mean, min(0.0, interval.mean + error))
    return mean - SLACK * half * math.sqrt(count / total) > -tolerance


def fixed_sequence(settings: Iterable[T], passes: Callable[[T], bool]) -> tuple[list[T], T | None]:
    """Test settings in their order until one fails.

    Args:
        settings: in an order that does not depend on the images of the test.
        passes: tests a setting.

    Returns:
        The settings that were tested, and the last that passed, or None.
    """
    tested, last = [], None
    for setting in settings:
        tested.append(setting)
        if not passes(setting):
            break
        last = setting
    return tested, last


def images_needed(interval: Interval, count: int, tolerance: float) -> int | None:
    """Return about how many images would show that a setting is within the tolerance.

    The width of an interval falls with the root of the number of images.

    Args:
        interval: the difference from dense.
        count: the number of images that it was measured on.
        tolerance: the largest loss.

    Returns:
        The number of images of such a part, or None if the difference itself is not within.
    """
    margin = interval.mean + tolerance
    if margin <= 0:
        return None
    return math.ceil(count * ((interval.mean - interval.low) / margin) ** 2)


def _is_share(measure: Measure) -> bool:
    """Return whether each image counts once, and is right or wrong."""
    right, all_ = measure.rows[:, 0], measure.rows[:, -1]
    return measure.statistic is ratio and bool(np.isin(right, (0, 1)).all() and (all_ == 1).all())
