"""Statistics of a study: comparisons of arms with seeds as blocks, in families.

A comparison is the mean difference between an arm and a reference, paired by seed. Its standard
error follows from an analysis of variance with the factors arm and seed, whose residual variance
the arms share. An arm whose differences vary more or less than those of the others (F-test) is not
part of it, and has the variance of its own differences instead, as in Welch's test.

Arms that train and arms that are only measured are analysed separately. The intervals of a family
are simultaneous, by Dunnett's test. `scipy.stats.dunnett` has no blocks; the tests compare with it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from statistics import fmean, stdev, variance
from typing import NamedTuple

import numpy as np

from benchmarks.studies.results import (
    LEVEL,
    Document,
    Interval,
    differences_by_seed,
    is_loss,
    values_of,
)
from elip_models.validation import require_extra

with require_extra("benchmarks.studies"):
    from scipy.optimize import brentq
    from scipy.stats import chi2, f, nct, norm, t

POWER = 0.8
UNEQUAL = 0.05  # significance level of the tests of equal variances
RESOLUTION = 1e-6  # metrics are rounded to six digits
Gaps = Mapping[int, float]  # difference of an arm from the reference, by seed


class Contrast(NamedTuple):
    """Mean difference of an arm from a reference.

    error: Its standard error; None with one seed, or if all seeds have the same difference.
    freedom: Degrees of freedom of the standard error.
    seeds: Seeds of the paired runs.
    pooled: True if the standard error is that of the analysis of variance.
    """

    mean: float
    error: float | None
    freedom: int
    seeds: frozenset[int]
    pooled: bool


def against(
    document: Document, reference: str, metrics: Sequence[str]
) -> dict[tuple[str, str], Interval]:
    """Return the intervals of all arms minus the reference, by arm and metric.

    The arms that train are one family, and those that are only measured another. A family has all
    metrics, between which the level is divided as by Bonferroni.
    """
    found = {}
    for trains in (True, False):
        of_metrics = {each: contrasts(document, reference, each, trains=trains) for each in metrics}
        tested = sum(any(each.error for each in arms.values()) for arms in of_metrics.values())
        level = 1 - (1 - LEVEL) / max(tested, 1)
        for metric, arms in of_metrics.items():
            found |= {(arm, metric): each for arm, each in dunnett(arms, level).items()}
    return found


def contrasts(
    document: Document, reference: str, metric: str, *, trains: bool
) -> dict[str, Contrast]:
    """Return the contrasts of all arms that train, or of all that are only measured.

    The arms whose trained model the reference begins with are left out.
    """
    values, arms = values_of(document, metric), document["arms"]
    gaps = {
        name: found
        for name, arm in arms.items()
        if name not in _ancestors(document, reference)
        and (arm["length"] > 0) == trains
        and (found := differences_by_seed(values, name, reference))
    }
    vary = {
        name: found
        for name, found in gaps.items()
        if len(found) > 1 and np.ptp([*found.values()]) > RESOLUTION
    }
    pooled = equal_variances(vary)
    shared = residual_variance(with_reference(pooled)) if pooled else None
    found = {}
    for name, of_seeds in gaps.items():
        error, freedom, count = None, len(of_seeds) - 1, len(of_seeds)
        if name in pooled and shared is not None:
            error, freedom = (2 * shared[0] / count) ** 0.5, shared[1]
        elif name in vary:
            error = stdev(of_seeds.values()) / count**0.5
        mean = fmean(of_seeds.values())
        found[name] = Contrast(mean, error, freedom, frozenset(of_seeds), name in pooled)
    return found


def _ancestors(document: Document, arm: str) -> list[str]:
    """Return the arm, and the arms whose trained models it begins with."""
    parent = document["arms"][arm]["parent"]
    return [arm] if parent is None else [arm, *_ancestors(document, parent)]


def with_reference(gaps: Mapping[str, Gaps]) -> dict[str, Gaps]:
    """Return the differences from a reference, and those of the reference, which are zero.

    Both have the residuals of the values from which the differences are: these are the differences
    plus one number for each seed.
    """
    seeds = dict.fromkeys(seed for each in gaps.values() for seed in each)
    return {"": dict.fromkeys(seeds, 0.0), **gaps}


def residual_variance(values: Mapping[str, Gaps]) -> tuple[float, int]:
    """Return the residual variance with the factors arm and seed, and its degrees of freedom."""
    seeds = {seed: i for i, seed in enumerate(with_reference(values)[""])}
    measured, of_seeds = [], []
    for each in values.values():
        found, blocks = np.array([*each.values()]), np.eye(len(seeds))[[seeds[x] for x in each]]
        measured.append(found - found.mean())
        of_seeds.append(blocks - blocks.mean(0))
    left, design = np.concatenate(measured), np.concatenate(of_seeds)
    effects, _, rank, _ = np.linalg.lstsq(design, left)
    rest = left - design @ effects
    freedom = len(rest) - len(values) - int(rank)
    return float(rest @ rest) / freedom, freedom


def equal_variances(gaps: Mapping[str, Gaps]) -> dict[str, Gaps]:
    """Return the arms whose differences have equal variances; none if the reference's is unequal.

    Of the arms with the largest and the smallest variance, the one with the smaller p-value is left
    out until no test rejects. If the reference varies as the arms do, the mean difference of a seed
    has the variance of one arm, times 1 + 1 / number of arms.
    """
    pooled = dict(gaps)
    while len(pooled) > 2:
        ordered = sorted(pooled, key=lambda name: variance(pooled[name].values()))
        chance, extreme = min((_unequal(pooled, name), name) for name in (ordered[0], ordered[-1]))
        if chance > UNEQUAL:
            break
        del pooled[extreme]
    if len(pooled) < 2:
        return pooled
    seeds = with_reference(pooled)[""]
    means = [fmean(each[seed] for each in pooled.values() if seed in each) for seed in seeds]
    shared, freedom = residual_variance(pooled)
    limit = f.ppf(1 - UNEQUAL, len(means) - 1, freedom) * shared
    return pooled if variance(means) / (1 + 1 / len(pooled)) <= limit else {}


def _unequal(gaps: Mapping[str, Gaps], arm: str) -> float:
    """Return the p-value of a two-sided F-test of an arm's differences against the others."""
    others, freedom = residual_variance(
        with_reference({name: each for name, each in gaps.items() if name != arm})
    )
    own, count = variance(gaps[arm].values()), len(gaps[arm])
    ratio = own / (2 * others) if others else float("inf")
    return 2 * min(float(tail(ratio, count - 1, freedom)) for tail in (f.sf, f.cdf))


def dunnett(found: Mapping[str, Contrast], level: float = LEVEL) -> dict[str, Interval]:
    """Return simultaneous intervals of arms that are compared with one reference.

    With separate variances the critical values are Sidak's, as in Dunnett's T3.
    """
    tested = [each for each in found.values() if each.error]
    intervals = {}
    for name, each in found.items():
        critical = None
        if each.error:
            correlation = _least_correlation(frozenset(other.seeds for other in tested))
            if not each.pooled:
                critical = float(t.ppf((1 + level ** (1 / len(tested))) / 2, each.freedom))
            else:
                critical = dunnett_quantile(len(tested), each.freedom, correlation, level)
        intervals[name] = _interval(each, critical)
    return intervals


def margin(document: Document, reference: str, metric: str) -> float | None:
    """Return by how much the study's arm `margin` has a higher loss than the reference.

    None without such an arm, for metrics other than losses, and if its loss is not higher.
    """
    arm = document.get("margin")
    if arm is None or arm == reference or not is_loss(metric):
        return None
    gaps = differences_by_seed(values_of(document, metric), arm, reference)
    deficit = fmean(gaps.values()) if gaps else 0.0
    return deficit if deficit > 0 else None


def bounds(document: Document, reference: str, metric: str) -> dict[str, float]:
    """Return the bound of the absolute difference of each arm that trains.

    An arm is equivalent to the reference if its bound is below the margin. These are two one-sided
    tests (TOST), simultaneous for all arms at 5%: the interval has the level 90%.
    """
    arms = contrasts(document, reference, metric, trains=True)
    found = dunnett(arms, 1 - 2 * (1 - LEVEL))
    return {
        arm: abs(each.mean) + each.half
        for arm, each in found.items()
        if each.half is not None and arm != document.get("margin")
    }


@cache
def dunnett_quantile(count: int, freedom: int, correlation: float, level: float) -> float:
    """Return the quantile of the largest of `count` absolute t variables.

    They share their denominator, and each two have this correlation.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    steps = (np.arange(1000) + 0.5) / 1000
    scale = np.sqrt(chi2.ppf(steps, freedom) / freedom)[:, None]
    shift, width = correlation**0.5 * nodes, (1 - correlation) ** 0.5

    def excess(critical: float) -> float:
        ends = critical * scale
        inside = norm.cdf((ends - shift) / width) - norm.cdf((-ends - shift) / width)
        return float((inside**count @ weights).mean() / weights.sum()) - level

    return float(brentq(excess, 0.1, 1e4, xtol=1e-6))


@cache
def _least_correlation(of_arms: frozenset[frozenset[int]]) -> float:
    """Return the smallest correlation of two differences, given the seeds of each.

    It is 0.5 if all arms have the same seeds. A smaller correlation gives longer intervals.
    """
    return min(
        (0.5 * len(a & b) / (len(a) * len(b)) ** 0.5 for a, b in combinations(of_arms, 2)),
        default=0.5,
    )


def _interval(each: Contrast, critical: float | None) -> Interval:
    if each.error is None or critical is None:
        return Interval(each.mean, None, len(each.seeds))
    effect = detectable_ratio(critical, each.freedom) * each.error
    half = critical * each.error
    return Interval(each.mean, half, len(each.seeds), effect, each.pooled)


@cache
def detectable_ratio(critical: float, freedom: int) -> float:
    """Return the effect, in standard errors, that exceeds the critical value with 80% power."""
    return float(brentq(lambda effect: nct.sf(critical, freedom, effect) - POWER, 0, 4 * critical))
