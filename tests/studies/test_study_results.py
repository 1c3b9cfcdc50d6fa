"""Results of a study: intervals, costs, conclusions and pages."""

from pathlib import Path

import pytest

from benchmarks.studies import results
from benchmarks.studies.analysis import against
from benchmarks.studies.page import differences, means
from benchmarks.studies.results import (
    by_seed,
    read_results,
    relative_cost,
    relative_time,
)
from benchmarks.tables import table

DENSE = {"step_flops": 1.0, "step_time": 1.0}
FASTER = {"step_flops": 0.5, "step_time": 0.8}


def document(**arms):
    """Return results whose runs have these r1 by arm, one value per seed."""
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "metrics": {"r1": value},
            "images": 100,
            **(DENSE if arm == "dense" else FASTER),
            "measured_on": {"device": "cpu", "torch": "2"},
            "commit": {"id": "0123456789"},
        }
        for arm, values in arms.items()
        for seed, value in enumerate(values)
        if value is not None
    ]
    settings = {arm: {"family": arm, "parent": None, "length": 1.0} for arm in arms}
    return {
        "study": "tiny",
        "question": "Is it?",
        "paper": "yes.",
        "recipe": "clip_tiny",
        "quality": ["r1"],
        "references": ["dense"],
        "overrides": {},
        "arms": settings,
        "runs": runs,
    }


def test_differences_pair_runs_that_begin_with_the_same_model():
    """Use a `dense` that was trained twice: the seed counts once for a run that pairs with both."""
    found = document(dense=[0.5, 0.5], tome=[0.6, 0.7], anew=[0.9, 0.9])
    for run in found["runs"]:
        run["beginning"] = 2.0 if run["arm"] == "anew" else 1.0
    again = [run | {"beginning": 2.0, "metrics": {"r1": 0.8}} for run in found["runs"][:2]]
    found["runs"] += again
    assert mean(found, "tome", "dense") == pytest.approx(0.15)
    assert mean(found, "anew", "dense") == pytest.approx(0.1)
    assert mean(found, "anew", "tome") is None
    assert by_seed(found, "dense", "r1") == {0: 0.65, 1: 0.65}
    found["runs"][2]["beginning"] = None
    assert mean(found, "tome", "dense") == pytest.approx((-0.05 + 0.2) / 2)


def mean(found, arm, reference):
    """Return the mean difference in r1, or None."""
    interval = against(found, reference, ["r1"]).get((arm, "r1"))
    return None if interval is None else interval.mean


def test_cost_is_that_of_the_whole_run_relative_to_the_first_reference():
    found = document(dense=[0.5, 0.7], half=[0.5, 0.6])
    for run in found["runs"]:
        if run["arm"] == "half":
            run["images"] = 50
    assert relative_cost(found, "half") == 0.25
    assert relative_time(found, "half") == pytest.approx(0.4)
    found["arms"]["half"]["parent"] = "dense"
    assert relative_cost(found, "half") == 0.5
    assert relative_time(found, "half") is None


def test_a_difference_is_bold_if_its_interval_excludes_zero():
    """Use two arms with the residual variance of both, so that their intervals have one length."""
    found = document(
        dense=[0.50, 0.70, 0.60],
        up=[0.60, 0.81, 0.70],
        alike=[0.50, 0.705, 0.598],
        once=[0.9, None, None],
        same=[0.50, 0.70, 0.60],
        absent=[],
    )
    (header, rows), notes = differences(found, "dense")
    up, alike = (against(found, "dense", ["r1"])[arm, "r1"] for arm in ("up", "alike"))
    assert up.half == pytest.approx(alike.half) and up.pooled
    low, high = (f"{100 * (up.mean + sign * up.half):.1f}" for sign in (-1, 1))
    assert header == ["arm", "r1, points"]
    assert rows[0] == ["`up`", f"**+10.3 ({low} to {high})**"]
    assert rows[1][0] == "`alike`" and "*" not in rows[1][1] and rows[1][1].startswith("+0.1 (−")
    assert rows[2:] == [["`once`", "+40.0 (1 seed)"], ["`same`", "+0.0 (equal in all seeds)"]]
    effect = f"{100 * up.detectable:.1f}"
    assert notes == [
        f"Minimal detectable effect (80% power, median of the arms): r1 {effect} points."
    ]


COMMITTED = Path(results.__file__).parents[1] / "results" / "studies"


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_of_committed_pages_follow_from_the_committed_results(path):
    """The pages are those that `docs/study.py` of commit 1a22749 wrote."""
    found = read_results(path)
    page = (COMMITTED.parents[2] / "docs" / "studies" / f"{path.stem}.md").read_text()
    assert table(*means(found), left=1) in page
    for reference in found["references"]:
        columns, notes = differences(found, reference)
        assert table(*columns, left=1) in page and " ".join(notes) in page
