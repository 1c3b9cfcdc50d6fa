"""The accuracy of VQA against recorded results of two revisions of the official file."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from elip_models.pretraining.data import open_examples, soft_scores
from elip_models.pretraining.data.answers import (
    CONTRACTIONS,
    normalise_answer,
    strip_punctuation,
    vqa_accuracy,
)

GOLDEN = Path(__file__).parents[2] / "golden"
RECORDED = json.loads((GOLDEN / "vqa_accuracy.json").read_text())["cases"]


def shares(answers):
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}


@pytest.mark.parametrize("revision", [2017, 2021])
def test_the_accuracy_equals_the_official_one(revision):
    assert len(RECORDED) == 54
    for case in RECORDED:
        found = vqa_accuracy(shares(case["answers"]), case["predicted"], revision)
        assert 100 * found == pytest.approx(case[str(revision)], abs=1e-6), case


def test_people_who_agree_are_compared_as_they_wrote():
    for answer in ("none", "t-shirt", "a"):
        assert vqa_accuracy({answer: 1.0}, answer) == 0
        assert vqa_accuracy({answer: 1.0}, answer, 2021) == 1
    assert vqa_accuracy({"two": 0.9, "2": 0.1}, "2") == 0.3


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("Red", "red"),
        ("Mr. Smith.", "mr smith"),
        ("2.5", "2.5"),
        ("U.S.A.", "usa"),
        ("three", "3"),
        ("none", "0"),
        ("one of ten", "1 of 10"),
        ("the dog", "dog"),
        ("A dog and an apple", "dog and apple"),
        ("the", ""),
        ("theatre", "theatre"),
        ("dont", "don't"),
        ("Theyre", "they're"),
        ("its", "its"),
        ("shes", "shes"),
        ("3 oclock", "3 o'clock"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black/white (striped)?", "black white striped"),
        ("t-shirt", "t shirt"),
        ("t-shirt, 1,000", "tshirt 1000"),
        ("50%", "50%"),
        (" two\n words\t", "2 words"),
        ("", ""),
    ],
)
def test_normalised_answers(answer, written):
    assert normalise_answer(answer) == written
    assert normalise_answer(written) == written


def test_contractions_lack_one_apostrophe():
    assert len(CONTRACTIONS) == 114
    assert {key: CONTRACTIONS[key] for key in ("notve", "he'dve", "hed've", "twas", "yall'll")} == {
        "notve": "not've",
        "he'dve": "he'd've",
        "hed've": "he'd've",
        "twas": "'twas",
        "yall'll": "y'all'll",
    }


@pytest.mark.parametrize(("agree", "accuracy"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_is_the_mean_over_all_sets_of_nine(agree, accuracy):
    given = ["yes"] * agree + ["no"] * (10 - agree)
    assert soft_scores({"yes": agree / 10})["yes"] == pytest.approx(accuracy, abs=1e-12)
    sets = [min(nine.count("yes") / 3, 1) for nine in combinations(given, 9)]
    assert sum(sets) / 10 == pytest.approx(accuracy, abs=1e-12)


def test_annotations_stay_as_written_and_the_list_of_answers_is_normalised(tmp_path):
    said = ["Two dogs."] * 4 + ["2 dogs"] * 3 + ["the"] * 3
    questions, annotations = [], []
    for number in range(9):
        questions.append({"question_id": number, "image_id": number // 3, "question": "what?"})
        answers = [{"answer": each} for each in said]
        annotations.append(
            {"question_id": number, "answers": answers, "multiple_choice_answer": "Two dogs."}
        )
    files = {
        "questions.json": {"questions": questions, "data_subtype": "val2014"},
        "annotations.json": {"annotations": annotations},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    spec = f"{tmp_path}/questions.json,{tmp_path}/annotations.json"
    source = open_examples("vqa", spec, image_size=8)
    assert source.answers == ("2 dogs",)
    given = source.text_alone(0).answers
    assert given == {"Two dogs.": 0.4, "2 dogs": 0.3, "the": 0.3}
    assert strip_punctuation("Two dogs.") == "Two dogs"
    assert (vqa_accuracy(given, "2 dogs"), vqa_accuracy(given, "2 dogs", 2021)) == (0.9, 1.0)
    assert [source.image_number(i) for i in range(9)] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    both = open_examples("vqa", [spec, spec], image_size=8)
    assert [both.image_number(i) for i in (8, 9, 17)] == [6, 9, 15]
