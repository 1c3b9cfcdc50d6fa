"""Normalisation of answers as on the evaluation page of VQA, and the accuracy formula."""

import json
from itertools import combinations

import pytest

from elip_models.data import open_examples, soft_scores
from elip_models.data.tasks.vqa_answers import normalise_answer


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
        ("theatre", "theatre"),
        ("dont", "don't"),
        ("Theyre", "they're"),
        ("its", "its"),
        ("3 oclock", "3 o'clock"),
        ("girl's", "girl's"),
        ("girls", "girls"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black/white (striped)?", "black white striped"),
        ("t-shirt", "t shirt"),
        ("50%", "50%"),
        (" two\n words\t", "2 words"),
        ("", ""),
    ],
)
def test_normalised_answers(answer, written):
    assert normalise_answer(answer) == written
    assert normalise_answer(written) == written


@pytest.mark.parametrize(("agree", "accuracy"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_is_the_mean_over_all_sets_of_nine(agree, accuracy):
    given = ["yes"] * agree + ["no"] * (10 - agree)
    assert soft_scores({"yes": agree / 10})["yes"] == pytest.approx(accuracy, abs=1e-12)
    sets = [min(nine.count("yes") / 3, 1) for nine in combinations(given, 9)]
    assert sum(sets) / 10 == pytest.approx(accuracy, abs=1e-12)


def test_annotations_are_normalised(tmp_path):
    said = ["Two dogs."] * 4 + ["2 dogs"] * 3 + ["the"] * 3
    question = {"question_id": 7, "image_id": 1, "question": "what?"}
    annotation = {
        "question_id": 7,
        "answers": [{"answer": each} for each in said],
        "multiple_choice_answer": "Two dogs.",
    }
    files = {
        "questions.json": {"questions": [question], "data_subtype": "val2014"},
        "annotations.json": {"annotations": [annotation]},
        "list.json": ["2 dogs", "the"],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    spec = f"{tmp_path}/questions.json,{tmp_path}/annotations.json,answers={tmp_path}/list.json"
    source = open_examples("vqa", spec, image_size=8)
    assert source.text_alone(0).answers == {"2 dogs": 0.7, "the": 0.3}
