"""The accuracy of VQA against recorded results of the official file."""

import json
from collections import Counter
from pathlib import Path

import pytest

from elip_models.pretraining.data import open_examples
from elip_models.pretraining.data.answers import vqa_accuracy

GOLDEN = Path(__file__).parents[2] / "golden"
RECORDED = json.loads((GOLDEN / "vqa_accuracy.json").read_text())["cases"]


def shares(answers):
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}


def test_the_accuracy_equals_the_official_one():
    assert len(RECORDED) == 54
    for case in RECORDED:
        accuracy = vqa_accuracy(shares(case["answers"]), case["predicted"])
        assert 100 * accuracy == pytest.approx(case["2017"], abs=1e-6), case


def test_the_list_of_answers_is_normalised_but_people_are_compared_as_they_wrote(tmp_path):
    said = ["Two dogs."] * 4 + ["2 dogs"] * 3 + ["the"] * 3
    questions = [{"question_id": i, "image_id": i // 3, "question": "what?"} for i in range(9)]
    answers = {"answers": [{"answer": text} for text in said], "multiple_choice_answer": said[0]}
    annotations = [{"question_id": i} | answers for i in range(9)]
    questions_file, annotations_file = tmp_path / "questions.json", tmp_path / "annotations.json"
    questions_file.write_text(json.dumps({"questions": questions, "data_subtype": "val2014"}))
    annotations_file.write_text(json.dumps({"annotations": annotations}))
    source = open_examples("vqa", f"{questions_file},{annotations_file}", image_size=8)
    assert source.answers == ("2 dogs",)
    written = source.text_alone(0).answers
    assert written == {"Two dogs.": 0.4, "2 dogs": 0.3, "the": 0.3}
    assert vqa_accuracy(written, "2 dogs") == 0.9
    assert [source.image_number(i) for i in range(9)] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
