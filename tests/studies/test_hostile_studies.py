"""Studies of wrong kinds: one sentence before anything trains, and no file outside of the runs."""

import os

import pytest
import yaml

from tests.helpers.programs import study_status
from tests.helpers.study_case import TINY

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
