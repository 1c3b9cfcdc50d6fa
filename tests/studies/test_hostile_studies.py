"""Studies of wrong kinds: one sentence before anything trains, and no file outside of the runs."""

import json
import os

import pytest
import yaml

from benchmarks.studies import runner
from benchmarks.studies.plan import plan, seeds_of
from benchmarks.studies.results import OF_STUDY, read_results
from elip_models.validation import ConfigError
from tests.helpers.programs import study_status
from tests.helpers.study_case import TINY, tiny_study

STUDIES = {
    "group outside": ({"group": "../../x"}, "group: expected a name of letters, digits"),
    "tokenizer": ({"arms": {"tokenizer": {}}}, "arms: expected a name of letters, digits"),
    "same share": (
        {"arms": {"a": {"at_flops": [0.501, 0.502]}}},
        "arms.a: expected arms of other names, got 'a-0.50' twice",
    ),
    "no overrides": ({"overrides": None}, "overrides: expected a mapping"),
    "seed twice": ({"seeds": [1, 1]}, "seeds: expected each once, got 1 twice"),
    "margin": ({"margin": "danse"}, "margin: expected some of dense, "),
    "like itself": ({"like": "tiny.yaml"}, "like: expected at most 8 studies"),
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


@pytest.mark.parametrize("text", ["5" * 5000, "٣", "1,", "-1", "1,1", "0,00", "0x1", "1e3"])
def test_hostile_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds: expected"):
        seeds_of(text)


RESULTS = {
    "no JSON": "[",
    "nothing": "{}",
    "runs": json.dumps(dict.fromkeys(OF_STUDY) | {"arms": {}, "runs": [1]}),
    "arms": json.dumps(dict.fromkeys(OF_STUDY) | {"arms": {"a": {}}, "runs": []}),
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
