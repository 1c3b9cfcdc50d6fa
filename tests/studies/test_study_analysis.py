"""Analysis of a study: known examples, error rates in simulations, power and equivalence."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.studies.analysis import (
    Contrast,
    against,
    bounds,
    contrasts,
    dunnett,
    margin,
    residual_variance,
    with_reference,
)

LOSS = "contrastive_loss"
EXTRUSION = {  # Montgomery, Design and Analysis of Experiments: pressures in four resin batches
    "8500": [90.3, 89.2, 98.2, 93.9, 87.4, 97.9],
    "8700": [92.5, 89.5, 90.6, 94.7, 87.0, 95.8],
    "8900": [85.5, 90.8, 89.6, 86.2, 88.0, 93.4],
    "9100": [82.5, 89.5, 85.6, 87.4, 78.9, 90.7],
}


def study(measured, *, margin=None):
    """Return results with these losses by arm, one value for each seed, or None."""
    runs = [
        {"arm": arm, "seed": seed, "metrics": {LOSS: float(value)}}
        for arm, values in measured.items()
        for seed, value in enumerate(values)
        if value is not None
    ]
    arms = {arm: {"family": arm, "parent": None, "length": 1.0} for arm in measured}
    return {"arms": arms, "runs": runs, "references": ["dense"], "margin": margin}


def simulated(rng, arms, seeds, *, effects=0.0, scales=1.0):
    """Return results of arms with the same seeds: an effect, that of the seed, and noise."""
    noise = (
        rng.normal(size=(arms + 1, seeds)) * np.append(1.0, np.broadcast_to(scales, arms))[:, None]
    )
    values = noise + 5 * rng.normal(size=seeds)
    values[1:] += np.broadcast_to(effects, arms)[:, None]
    return study({"dense": values[0]} | {f"arm{i}": row for i, row in enumerate(values[1:])})


def test_the_residual_variance_is_that_of_a_textbook():
    values = {arm: dict(enumerate(each)) for arm, each in EXTRUSION.items()}
    variance, freedom = residual_variance(values)
    assert (variance, freedom) == (pytest.approx(7.33, abs=0.005), 15)
    gaps = {
        arm: {seed: value - values["8500"][seed] for seed, value in each.items()}
        for arm, each in values.items()
        if arm != "8500"
    }
    assert residual_variance(with_reference(gaps)) == (pytest.approx(variance), 15)


def test_intervals_are_those_of_scipys_dunnett():
    """Compare the critical value: scipy has no blocks, so its variance has other freedom."""
    samples = np.random.default_rng(0).normal(size=(5, 6))
    theirs = stats.dunnett(*samples[1:], control=samples[0], random_state=1)
    ends = theirs.confidence_interval(0.95)
    error = np.sqrt(samples.var(axis=1, ddof=1).mean() * 2 / 6)
    found = {
        str(i): Contrast(mean, float(error), 25, frozenset(range(6)), pooled=True)
        for i, mean in enumerate(samples[1:].mean(axis=1) - samples[0].mean())
    }
    for interval, low, high in zip(dunnett(found).values(), *ends, strict=True):
        assert interval.mean - interval.half == pytest.approx(low, abs=2e-3)
        assert interval.mean + interval.half == pytest.approx(high, abs=2e-3)


def test_one_arm_has_the_interval_of_the_paired_t_test():
    measured = {"dense": [1.0, 2.0, 3.0, 5.0], "tome": [1.5, 2.2, 3.1, 5.9]}
    found = against(study(measured), "dense", [LOSS])["tome", LOSS]
    ends = stats.ttest_rel(measured["tome"], measured["dense"]).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(ends.low, rel=1e-3)


@pytest.mark.parametrize(("seeds", "most"), [(3, 0.11), (8, 0.08)])
def test_few_studies_of_equal_arms_have_a_significant_difference(seeds, most):
    """Allow two standard errors of 300 studies (0.013) above 8% and 5%."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        found = against(simulated(rng, 8, seeds), "dense", [LOSS])
        wrong += any(each.is_significant for each in found.values())
    assert 0.02 <= wrong / 300 <= most


def test_intervals_cover_all_effects_if_an_arm_varies_more():
    rng, covered = np.random.default_rng(1), 0
    effects, scales = np.linspace(-3, 3, 8), np.append(np.ones(7), 8.0)
    for _ in range(300):
        found = against(simulated(rng, 8, 8, effects=effects, scales=scales), "dense", [LOSS])
        gaps = zip(found.values(), effects, strict=True)
        covered += all(abs(each.mean - effect) <= each.half for each, effect in gaps)
    assert covered / 300 >= 0.92


def test_an_arm_is_equivalent_if_its_bound_is_below_the_margin():
    dense = np.array([1.0, 2.0, 3.0, 4.0])
    measured = {
        "dense": dense,
        "short": dense + np.array([0.9, 1.1, 1.05, 0.95]),
        "near": dense + np.array([0.02, -0.01, 0.03, -0.02]),
        "far": dense + np.array([0.6, 0.7, 0.5, 0.6]),
    }
    document = study(measured, margin="short")
    assert margin(document, "dense", LOSS) == pytest.approx(1.0)
    assert margin(document, "short", LOSS) is margin(document, "dense", "top1") is None
    found = bounds(document, "dense", LOSS)
    assert found.keys() == {"near", "far"}
    interval = dunnett(contrasts(document, "dense", LOSS, trains=True), 0.9)["far"]
    assert found["far"] == pytest.approx(0.6 + interval.half)
    assert found["near"] < 0.3 < 0.6 < found["far"]
