"""Studies of wrong kinds: one sentence before anything trains, and no file outside of the runs."""

import json
import os

import pytest
import yaml

from benchmarks.studies import runner
from benchmarks.studies.plan import plan, seeds_of
from benchmarks.studies.results import read_results
from elip_models.validation import ConfigError
from tests.helpers.programs import study_status
from tests.helpers.study_case import TINY, tiny_study

STUDIES = {
    "group outside": ({"group": "../../x"}, "group: expected a name of letters, digits"),
    "group above": ({"group": ".."}, "group: expected a name of letters, digits"),
    "group as path": ({"group": "/tmp/x"}, "group: expected a name of letters, digits"),
    "empty group": ({"group": ""}, "group: expected a name of letters, digits"),
    "long group": ({"group": "x" * 300}, "group: expected a name of letters, digits"),
    "group of a kind": ({"group": [1]}, "group: must be a valid string"),
    "arm outside": ({"arms": {"../x": {}}}, "arms: expected a name of letters, digits"),
    "tokenizer": ({"arms": {"tokenizer": {}}}, "arms: expected a name of letters, digits"),
    "same share": (
        {"arms": {"a": {"at_flops": [0.501, 0.502]}}},
        "arms.a: expected arms of other names, got 'a-0.50' twice",
    ),
    "same name": (
        {"arms": {"a-0.50": {}, "a": {"at_flops": [0.5]}}},
        "arms.a: expected arms of other names, got 'a-0.50' twice",
    ),
    "share of a kind": ({"arms": {"a": {"at_flops": ["x"]}}}, "arms.a.at_flops: must be a valid"),
    "parent of a kind": ({"arms": {"a": {"from": [1]}}}, "arms.a.parent: must be a valid string"),
    "arms of a kind": ({"arms": [1]}, "arms: expected a mapping of names to arms"),
    "overrides of a kind": ({"overrides": [1]}, "overrides: expected a mapping"),
    "no overrides": ({"overrides": None}, "overrides: expected a mapping"),
    "no reference": ({"references": []}, "references: expected one or more, got none"),
    "reference twice": ({"references": ["dense", "dense"]}, "references: expected each once"),
    "no seed": ({"seeds": []}, "seeds: expected one or more, got none"),
    "seed twice": ({"seeds": [1, 1]}, "seeds: expected each once, got 1 twice"),
    "large seed": ({"seeds": [2**32]}, "seeds: expected a tuple, each an integer in"),
    "no measure": ({"measures": []}, "measures: expected one or more, got none"),
    "metric": (
        {"quality": ["dense.r9"]},
        "quality: expected metrics of retrieval, got 'dense.r9'",
    ),
    "metric of another": (
        {"quality": ["objective.loss"]},
        "quality: expected metrics of retrieval, got 'objective.loss'",
    ),
    "like of a kind": ({"like": [1]}, "like: expected the name of a study or a path"),
    "margin": ({"margin": "danse"}, "margin: expected some of ['dense', "),
    "like itself": ({"like": "tiny.yaml"}, "like: expected at most 8 studies"),
    "recipe": ({"recipe": 5}, "recipe: must be a valid string"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_hostile_study_is_one_line_before_anything_trains(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    changes, said = STUDIES[name]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    assert study_status("tiny.yaml") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) < 1000
    assert os.listdir(tmp_path) == ["tiny.yaml"]


@pytest.mark.parametrize("text", ["5" * 5000, "٣", "1,", "-1", "1,1", "4294967296", "0x1", "1e3"])
def test_hostile_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds: expected"):
        seeds_of(text)


RESULTS = {
    "no JSON": "[",
    "list": "[]",
    "deep": "[" * 100_000,
    "nothing": "{}",
    "runs": json.dumps({"study": "a", "arms": {}, "runs": [1]}),
    "binary": "\0",
}


@pytest.mark.parametrize("name", RESULTS)
def test_hostile_results_are_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text(RESULTS[name])
    with pytest.raises(ConfigError, match=r"results: .*expected"):
        read_results(tmp_path / "results.json")
    arguments = ["--results", "results.json", "--page", "page.md"]
    assert study_status("quality", *arguments) == 2
    assert "results: " in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize("option", ["--results", "--page"])
@pytest.mark.parametrize("path", ["missing/a.md", ".", "x" * 300])
def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path, monkeypatch, option, path):
    monkeypatch.chdir(tmp_path)
    assert study_status("quality", option, path) == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "a\0"], "Invalid value for '--results'"),
        (["--seeds", "5000000000", "--dry-run"], "--seeds: expected"),
        (["optim.lr=fast", "--dry-run"], "optim.lr: must be a valid number"),
    ],
)
def test_an_invalid_command_is_one_error(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert study_status("quality", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == []


def test_new_runs_need_a_checkout_without_uncommitted_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = tiny_study(tmp_path)
    runs = plan(study, only=["dense"], seeds=[0])
    monkeypatch.setattr(runner, "commit", lambda: {"id": "0123456789", "dirty": True})
    with pytest.raises(ConfigError, match=r"got changes to commit 0123456; .* --allow-dirty"):
        runner.check_tree(study, runs, allow_dirty=False)
    runner.check_tree(study, runs, allow_dirty=True)
    folder = study.folder(runs[0])
    folder.mkdir(parents=True)
    (folder / runner.RESULT).write_text(json.dumps({"measures": study.measures}))
    runner.check_tree(study, runs, allow_dirty=False)  # no run is left
    monkeypatch.setattr(runner, "commit", lambda: {"id": "0123456789", "dirty": False})
    runner.check_tree(study, plan(study), allow_dirty=False)
