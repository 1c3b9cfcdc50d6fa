"""The study of a small LLaVA, with random features in place of DINOv2's."""

import json

import pytest
import torch

from benchmarks.vlm import questions, study
from elip_models.data.tasks.questions import EmojiQuestions


@pytest.fixture
def features(monkeypatch):
    shape = questions.TOKENS, questions.WIDTH
    monkeypatch.setattr(questions, "_features", lambda source, _: torch.randn(len(source), *shape))


def test_every_word_and_every_answer_has_an_id(features, tmp_path):
    data = questions.read_questions(60, 3, tmp_path)
    known = questions.vocabulary()
    names = {i: name for name, i in known.items()}
    source = EmojiQuestions(60, seed=3)
    for i in range(60):
        example = source.text_alone(i)
        words = " ".join(names[each] for each in data.ids[i].tolist() if each)
        assert words + "?" == example.text
        right = {f"answer: {each}": share for each, share in example.answers.items()}
        found = {names[i]: share for i, share in enumerate(data.answers[i].tolist()) if share}
        assert found == pytest.approx(right)
    assert data.kinds.bincount().tolist() == [10] * len(questions.KINDS)


def test_the_study_compares_each_setting_with_every_token(features, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "KEEPS", (0.25,))
    output = tmp_path / "study.json"
    sizes = ["--seeds", "2", "--questions", "24", "--evaluated", "24", "--steps", "2"]
    assert study.main([str(tmp_path), "--output", str(output), *sizes]) == 0
    document = json.loads(output.read_text())
    names = [row["setting"] for row in document["settings"]]
    reduced = [f"{strategy} 0.25" for strategy in study.STRATEGIES]
    trained = [f"trained with {strategy} 0.25" for strategy in study.TRAINED]
    assert names == ["dense", *reduced, *trained]
    assert document["seeds"] == 2
    for row in document["settings"]:
        mean, low, high = row["accuracy"]
        assert 0 <= low <= mean <= high <= 1
        assert mean == pytest.approx(sum(row["by_seed"]) / 2)
        assert row["by_kind"].keys() == set(questions.KINDS)
    assert document["settings"][0]["difference"] == [0, 0, 0]
