"""Answers are written alike as the evaluation page of VQA says, and scored by its formula."""

from itertools import combinations

import numpy as np
import pytest

from elip_models.tasks.vqa_accuracy import normalise_answer, vqa_accuracies, vqa_accuracy


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
def test_answers_are_written_alike(answer, written):
    assert normalise_answer(answer) == written
    assert normalise_answer(written) == written


@pytest.mark.parametrize(
    ("agree", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_is_the_mean_over_all_sets_of_nine(agree, accuracy):
    given = ["Yes."] * agree + ["no"] * (10 - agree)
    assert vqa_accuracy("yes", given) == pytest.approx(accuracy, abs=1e-12)
    sets = [min(nine.count("Yes.") / 3, 1) for nine in combinations(given, 9)]
    assert vqa_accuracy("yes", given) == pytest.approx(sum(sets) / 10, abs=1e-12)


def test_each_question_has_its_accuracy():
    given = [["two"] * 10, ["a cat"] * 2 + ["dog"] * 8]
    found = vqa_accuracies(["2", "cat"], given)
    np.testing.assert_allclose(found, [1.0, 0.6], rtol=0, atol=1e-12)
    with pytest.raises(ValueError):
        vqa_accuracies(["2"], given)
    with pytest.raises(ValueError, match="given: expected the answers of at least two people"):
        vqa_accuracy("2", ["2"])
