"""The study of a small LLaVA, with random features in place of DINOv2's."""

import json

import pytest
import torch

from benchmarks.vlm import questions, study
from elip_models.pretraining.data.tasks.questions import EmojiQuestions
from tests.project.test_docs import script


@pytest.fixture
def features(monkeypatch):
    def random(source, _):
        patches = (source.image_size // 14) ** 2
        return torch.randn(len(source), patches, questions.WIDTH)

    monkeypatch.setattr(questions, "_features", random)


def test_every_word_and_every_answer_has_an_id(features, tmp_path):
    data = questions.read_questions(60, 3, tmp_path)
    known = questions.vocabulary()
    names = {i: name for name, i in known.items()}
    source = EmojiQuestions(60, seed=3)
    for i in range(60):
        example = source.text_alone(i)
        words = [names[word] for word in data.ids[i].tolist() if word]
        assert words == questions.tokens_of(example.text)
        answers = {names[i]: share for i, share in enumerate(data.answers[i].tolist()) if share}
        assert answers == pytest.approx(example.answers)
    assert data.kinds.bincount().tolist() == [10] * len(questions.KINDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("how many palm trees are there?", ["how", "many", "palm tree", "are", "there"]),
        ("what is at the top left?", ["what", "is", "top left"]),
    ],
)
def test_a_name_and_a_place_are_one_word(text, expected):
    assert questions.tokens_of(text) == expected


def test_further_questions_have_the_answers_of_their_scene(features, tmp_path):
    data = questions.read_questions(40, 3, tmp_path)
    names = {i: name for name, i in questions.vocabulary().items()}
    source = EmojiQuestions(40, seed=3)
    for i in range(40):
        groups = {group.name: group for group in source.scenes(i)[0].groups}
        text = [names[word] for word in data.turns[i].tolist() if word]
        answers = [names[word] for word in data.told[i].tolist() if word]
        assert len(answers) == len(groups) + 2 and {"yes", "no"} <= set(answers)
        for answer in answers:
            *asked, text = _until(text, answer)
            if asked[:2] == ["is", "there"]:
                assert (asked[-1] in groups) == (answer == "yes")
            elif asked[:2] == ["how", "many"]:
                assert groups[asked[2]].count == int(answer)
            elif asked[0] == "where":
                assert groups[asked[-1]].place.name == answer
            else:
                assert groups[answer].place.name == asked[-1]


def _until(text, answer):
    """Return the words of a question up to its answer, and as the last element those behind."""
    starts = [i for i, word in enumerate(text) if i and word in ("is", "how", "where", "what")]
    end = min(i for i in (*starts, len(text)) if text[i - 1] == answer)
    return [*text[: end - 1], text[end:]]


def test_the_study_compares_each_setting_with_every_token(features, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "KEEPS", (0.25,))
    monkeypatch.setattr(study, "COMPARED", ("random_tokens", "fastv:layer=1"))
    monkeypatch.setattr(study, "TRAINED", ("diverse",))
    output = tmp_path / "study.json"
    sizes = ["--seeds", "2", "--questions", "12", "--evaluated", "12", "--steps", "1"]
    assert study.main([str(tmp_path), "--output", str(output), *sizes]) == 0
    document = json.loads(output.read_text())
    names = [row["setting"] for row in document["settings"]]
    reduced = [f"{strategy} 0.25" for strategy in study.COMPARED]
    trained = [f"trained with {strategy} 0.25" for strategy in study.TRAINED]
    assert names == ["dense", *reduced, "smaller image 0.25", *trained]
    assert document["seeds"] == 2
    for row in document["settings"]:
        mean, low, high = row["accuracy"]
        assert 0 <= low <= mean <= high <= 1
        assert mean == pytest.approx(sum(row["by_seed"]) / 2)
        assert row["by_kind"].keys() == set(questions.KINDS)
    assert document["settings"][0]["difference"] == [0, 0, 0]
    monkeypatch.delattr(study, "train")  # a second run loads the trained models
    output.unlink()
    assert study.main([str(tmp_path), "--output", str(output), *sizes]) == 0
    assert json.loads(output.read_text())["settings"] == document["settings"]


def test_a_patch_of_a_smaller_image_has_the_mean_of_the_positions_it_covers():
    tower = study.StoredFeatures()
    small = tower(torch.zeros(1, 16, questions.WIDTH)).last_hidden_state[0]
    covered = [0, 1, 8, 9]
    torch.testing.assert_close(small[0], tower.positions[covered].mean(0))
    whole = tower(torch.zeros(1, 64, questions.WIDTH)).last_hidden_state[0]
    assert torch.equal(whole, tower.positions)


def test_padding_of_further_questions_is_not_computed(features, tmp_path):
    data = questions.read_questions(12, 3, tmp_path)
    longer = torch.nn.functional.pad(data.turns, (0, 5)), torch.nn.functional.pad(data.told, (0, 5))
    padded = data._replace(turns=longer[0], told=longer[1])
    model, rows = study._new_model(0), torch.arange(12)
    assert torch.equal(study.loss_of(model, data, rows), study.loss_of(model, padded, rows))


def test_the_tables_of_the_pages_are_up_to_date():
    assert script("vlm").main(["--check"]) == 0
