"""What a study says: intervals, costs, sentences, and the page."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from benchmarks.studies.command import write_page
from benchmarks.studies.page import differences, means
from benchmarks.studies.results import Interval, by_seed, difference, relative_cost, relative_time
from elip_models.validation import ConfigError

SCRIPT = Path(__file__).parents[2] / "docs" / "study.py"
_spec = spec_from_file_location("study_page", SCRIPT)
study_page = module_from_spec(_spec)
_spec.loader.exec_module(study_page)


def test_an_interval_is_that_of_student():
    assert Interval.of([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert Interval.of([5.0]) == (5.0, None)


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (2.0, 1.9, "above"),
        (-2.0, 1.9, "below"),
        (2.0, 2.0, "no difference seen"),
        (-0.1, 0.3, "no difference seen"),
        (0.0, 0.0, "no difference seen"),
        (2.0, None, "one seed"),
    ],
)
def test_nothing_is_claimed_whose_interval_has_zero_in_it(mean, half, verdict):
    assert Interval(mean, half).verdict == verdict


FASTER = {"step_flops": 0.5, "step_time": 0.8}


def document(**arms):
    """Results whose runs have these r1 by arm, a value a seed."""
    runs = [
        {
            **{"arm": arm, "seed": seed, "metrics": {"r1": value}, "images": 100},
            **({"step_flops": 1.0, "step_time": 1.0} if arm == "dense" else FASTER),
            **{"measured_on": {"device": "cpu", "torch": "2"}, "commit": {"id": "0123456789"}},
        }
        for arm, values in arms.items()
        for seed, value in enumerate(values)
        if value is not None
    ]
    said = {arm: {"family": arm, "parent": None, "length": 1.0} for arm in arms}
    return {
        **{"study": "tiny", "question": "Is it?", "paper": "yes.", "recipe": "clip_tiny"},
        **{"quality": ["r1"], "references": ["dense"], "overrides": {}},
        **{"arms": said, "runs": runs},
    }


def test_differences_are_of_the_seeds_that_both_have():
    found = document(dense=[0.5, 0.7, 0.6], better=[None, 0.8, 0.7])
    assert difference(found, "better", "dense", "r1") == (
        pytest.approx(0.1),
        pytest.approx(0, abs=1e-9),
    )
    assert difference(found, "dense", "absent", "r1") is None


def test_an_interval_is_no_shorter_than_that_of_all_arms_alike():
    """Two arms whose seeds differ by .01 and .03: of both, sqrt(.0005), with four degrees."""
    found = document(dense=[0.5, 0.5, 0.5], calm=[0.59, 0.60, 0.61], wild=[0.57, 0.60, 0.63])
    calm, wild = (difference(found, arm, "dense", "r1").half for arm in ("calm", "wild"))
    assert calm == pytest.approx(2.776445 * (0.0005 / 3) ** 0.5, rel=1e-6)
    assert wild == pytest.approx(4.302653 * 0.03 / 3**0.5, rel=1e-6)
    for arm in ("calm", "wild"):  # both measured alone
        found["arms"][arm]["length"] = 0
    assert difference(found, "calm", "dense", "r1").half == pytest.approx(calm)
    found["arms"]["calm"]["length"] = 1
    assert difference(found, "calm", "dense", "r1").half == pytest.approx(4.302653 * 0.01 / 3**0.5)


@pytest.mark.parametrize(
    ("third", "half"),
    [
        ([-0.4, 0.6, 1.6], 2.776445 * (0.0001 / 2) ** 0.5),  # of calm and still
        ([0.57, 0.60, 0.63], 2.446912 * (0.0010 / 3) ** 0.5),  # 18 times theirs: of all three
    ],
)
def test_an_arm_that_diverges_makes_no_interval_of_others_longer(third, half):
    """F(2, 4) is above 33 once in 300 times."""
    arms = {"dense": [0.5] * 3, "still": [0.6] * 3, "calm": [0.59, 0.60, 0.61], "third": third}
    found = document(**arms)
    assert difference(found, "still", "dense", "r1").half == pytest.approx(half / 3**0.5, rel=1e-5)
    own = Interval.of([value - 0.5 for value in third]).half
    assert difference(found, "third", "dense", "r1").half == pytest.approx(own)


def test_differences_are_of_runs_that_begin_with_one_model():
    """`dense` was trained anew; the seed counts once, where a run begins with either."""
    found = document(dense=[0.5, 0.5], tome=[0.6, 0.7], anew=[0.9, 0.9])
    for run in found["runs"]:
        run["beginning"] = 2.0 if run["arm"] == "anew" else 1.0
    again = [run | {"beginning": 2.0, "metrics": {"r1": 0.8}} for run in found["runs"][:2]]
    found["runs"] += again
    assert difference(found, "tome", "dense", "r1").mean == pytest.approx(0.15)
    assert difference(found, "anew", "dense", "r1").mean == pytest.approx(0.1)
    assert difference(found, "anew", "tome", "r1") is None
    assert by_seed(found, "dense", "r1") == {0: 0.65, 1: 0.65}
    found["runs"][2]["beginning"] = None
    assert difference(found, "tome", "dense", "r1").mean == pytest.approx((-0.05 + 0.2) / 2)


def test_cost_is_that_of_the_whole_run_against_the_first_reference():
    found = document(dense=[0.5, 0.7], half=[0.5, 0.6])
    for run in found["runs"]:
        if run["arm"] == "half":
            run["images"] = 50
    assert relative_cost(found, "half") == 0.25
    assert relative_time(found, "half") == pytest.approx(0.4)
    found["arms"]["half"]["parent"] = "dense"
    assert relative_cost(found, "half") == 0.5
    assert relative_time(found, "half") is None


def test_a_difference_is_bold_where_its_interval_leaves_zero_out():
    found = document(
        dense=[0.50, 0.70, 0.60],
        up=[0.60, 0.81, 0.70],
        down=[0.40, 0.61, 0.50],
        alike=[0.55, 0.68, 0.61],
        once=[0.9, None, None],
        absent=[],
    )
    assert differences(found, "dense") == (
        ["arm", "r1, %"],
        [
            ["`up`", "**+10.3 ± 1.4**"],
            ["`down`", "**−9.7 ± 1.4**"],
            ["`alike`", "+1.3 ± 8.7"],
            ["`once`", "+40.0"],
        ],
    )


def test_a_metric_that_no_run_has_is_named():
    with pytest.raises(ConfigError, match="quality: expected metrics of r1, got 'r2'"):
        means(document(dense=[0.5]) | {"quality": ["r1", "r2"]})


def test_the_page_is_that_of_the_results(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir(), docs.mkdir()
    arguments = ["--results", str(results), "--docs", str(docs)]
    (results / "tiny.json").write_text(json.dumps(document(dense=[0.5, 0.6], half=[0.5, 0.7])))
    assert study_page.main([*arguments, "--check"]) == 1
    assert study_page.main(arguments) == 0
    assert study_page.main([*arguments, "--check"]) == 0
    text = (docs / "study.md").read_text()
    assert "## Is it?" in text and "commit 0123456" in text
    assert "| `half` | 2 | 0.50 | 0.80 | – | 60.0 ± 127.1 |" in text
    assert "Less `dense`, seed by seed:" in text and "| `half` | +5.0 ± 63.5 |" in text
    assert "cost, dense = 1" in (docs / "study-tiny.svg").read_text()
    (docs / "study.md").write_text(text.replace("60.0", "61.0"))
    assert study_page.main([*arguments, "--check"]) == 1
    assert [path.name for path in write_page(results / "tiny.json", docs / "own.md")] == [
        *("own.md", "own.svg")
    ]


def test_the_committed_page_shows_the_committed_results():
    assert study_page.main(["--check"]) == 0


LOSS = "reduced.contrastive_loss"


@pytest.mark.parametrize(
    ("recall", "loss", "word"),
    [
        ((2.0, 1.0), (-1.0, 2.0), "better (top1)"),
        ((2.0, 3.0), (-1.0, 0.5), "better (contrastive_loss)"),
        ((0.1, 3.0), (1.0, 0.5), "worse (contrastive_loss)"),
        ((2.0, 1.0), (1.0, 0.5), "better (top1) and worse (contrastive_loss)"),
        ((2.0, 3.0), (1.0, 1.5), ""),
        ((2.0, None), (1.0, None), ""),
    ],
)
def test_an_answer_is_what_intervals_tell(recall, loss, word):
    gaps = {"reduced.top1": Interval(*recall), LOSS: Interval(*loss)}
    assert study_page.told(gaps) == word


def test_answers_are_made_of_what_is_there(monkeypatch, tmp_path):
    found = document(dense=[0.5, 0.52, 0.51], tome=[0.6, 0.62, 0.61], last=[0.4, 0.52, 0.45])
    for run in found["runs"]:
        value = run["metrics"].pop("r1")
        run["metrics"] = {"reduced.top1": value, LOSS: -value}
    asked = tmp_path / "answers.yaml"
    asked.write_text(
        "- question: Which?\n  about: Of two.\n  differences:\n"
        "    - {study: tiny, arm: tome, against: dense}\n"
        "    - {study: tiny, arm: last, against: dense}\n"
        "    - {study: another, arm: last, against: dense}\n"
    )
    monkeypatch.setattr(study_page, "ANSWERS", asked)
    text = study_page.answers({"tiny": found})
    sentences = (
        "`tome` is better (top1, contrastive_loss) than `dense`. Not told apart: `last` from"
    )
    assert f"**{sentences} `dense`.**" in text
    assert text.count("| tiny |") == 2 and "another" not in text


def test_every_difference_asked_for_is_known():
    results = {path.stem: json.loads(path.read_text()) for path in study_page.RESULTS.glob("*")}
    for entry in yaml.safe_load(study_page.ANSWERS.read_text()):
        for each in entry["differences"]:
            assert study_page._is_known(each, results, ["reduced.top1", "dense.r1"]), each
