"""Downstream tasks: training samples, and scores of models with known outputs."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elip_models.analysis.answer_scores import vqa_accuracy
from elip_models.intervals import wilson_interval
from elip_models.pretraining.data import DataError, Example
from elip_models.pretraining.tasks.registry import get_task
from elip_models.pretraining.tasks.vqa import VQA
from tests.helpers.task_cases import (
    LOADING,
    SIZE,
    Greys,
    Stub,
    Tokens,
    grey,
    preprocessor,
)

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(("task", "images"), [("entailment", 1), ("nlvr2", 2)])
def test_a_sample_of_classes_has_images_text_and_the_number_of_the_answer(task, images):
    source, rng = Greys(images), np.random.default_rng(0)
    sample = get_task(task).sample(preprocessor(source), source[3], 3, rng)
    shape = (3, SIZE, SIZE) if images == 1 else (2, 3, SIZE, SIZE)
    assert sample["images"].shape == shape and sample["labels"] == 1
    assert sample["input_ids"].tolist() == [4, 0, 0, 0]


class Pairs:
    """Pairs of a dark and a bright image with one statement."""

    answers = ("true", "false")

    def __init__(self, text):
        self.text = text

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Example((grey(20), grey(200)), self.text, {"true": 1.0}, "p")


class Words(Tokens):
    """Tokenizer that stores the texts."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts, **options):
        self.texts += texts
        return super().__call__(texts, **options)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("Left. The right one is left-handed", "right the left one is left-handed"),
        ("two dogs", "two dogs"),
        ("left, right", "left, left"),  # as split at spaces in BLIP's data/nlvr_dataset.py
    ],
)
def test_nlvr2_swaps_the_images_and_sides_of_every_second_example(text, swapped):
    source, tokenizer, rng = Pairs(text), Words(), np.random.default_rng(0)
    read = replace(preprocessor(source, captions="blip"), tokenizer=tokenizer)
    task, orders = get_task("nlvr2", swap_images=True), []
    for _ in range(40):
        sample = task.sample(read, source[0], 0, rng)
        orders.append(bool(sample["images"][0].mean() > sample["images"][1].mean()))
        assert tokenizer.texts[-1] == (swapped if orders[-1] else read.clean(text))
    assert 10 < sum(orders) < 30


def test_answers_are_generated_with_weights_or_classified_with_scores():
    source, rng = Greys(), np.random.default_rng(0)
    task = VQA(answers_per_question=3, answer_length=5)
    written = task.sample(preprocessor(source), source[1], 1, rng)
    assert written["answer_ids"].shape == written["answer_mask"].shape == (3, 5)
    assert written["answer_weights"].tolist() == pytest.approx([0.7, 0.1, 0.0])
    classified = task.sample(preprocessor(source, num_classes=2), source[1], 1, rng)
    assert classified["answer_scores"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("config", [{}, {"num_classes": 2}])
def test_a_correct_model_scores_1_and_its_predictions_are_stored(config):
    scores = VQA(candidates=9).evaluate(Stub(**config), Tokens(), Greys(), LOADING)
    assert scores.scores["accuracy"] == wilson_interval(1.0, 8)
    assert scores.baselines == {"chance": {"accuracy": 0.5}, "majority": {"accuracy": 0.5}}
    assert [prediction.output for prediction in scores.predictions] == ["dark", "bright"] * 4
    assert scores.summary() == "vqa: accuracy 100.0%"
    written = json.loads(json.dumps(scores.as_dict()))
    assert written["scores"]["accuracy"] == wilson_interval(1.0, 8)._asdict()
    assert written["predictions"][0] == {"id": "g0", "output": "dark", "score": 1.0}


def test_a_model_with_another_number_of_answers_than_the_data_is_refused():
    with pytest.raises(DataError, match=r"answers: expected 3, one for each output.*got the 2 of"):
        VQA().evaluate(Stub(num_classes=3), Tokens(), Greys(), LOADING)
    learned = ("dark", "bright", "grey")
    scores = VQA().evaluate(Stub(num_classes=3), Tokens(), Greys(), LOADING, learned)
    assert scores.baselines["chance"] == {"accuracy": 1 / 3}


def test_vqa_has_the_official_accuracy_and_targets_of_answers_as_written():
    class Written(Greys):
        answers = ("two dogs", "a cat")

        def text_alone(self, index):
            return super().text_alone(index)._replace(answers={"2 dogs": 0.2, "two dogs": 0.8})

    source, model = Written(), Stub(num_classes=2)
    scores = VQA().evaluate(model, Tokens(), source, LOADING)
    assert [prediction.score for prediction in scores.predictions] == [0.6, 0.0] * 4
    sample = VQA().sample(
        preprocessor(source, num_classes=2), source[0], 0, np.random.default_rng(0)
    )
    assert sample["answer_scores"].tolist() == [1.0, 0.0]


def test_the_accuracy_of_vqa_equals_the_recorded_one_of_the_official_file():
    cases = json.loads((GOLDEN / "vqa_accuracy.json").read_text())["cases"]
    assert len(cases) == 54
    for case in cases:
        counts = Counter(case["answers"])
        shares = {text: count / len(case["answers"]) for text, count in counts.items()}
        accuracy = vqa_accuracy(shares, case["predicted"])
        assert 100 * accuracy == pytest.approx(case["2017"], abs=1e-6), case


class Levels(Greys):
    """Four classes of a head; `asked` are those of the data."""

    def __init__(self, asked):
        super().__init__()
        self.answers = asked

    def text_alone(self, index):
        right = self.answers[index % len(self.answers)]
        return Example((), "", {right: 1.0}, f"g{index}")


def test_a_head_is_compared_among_the_classes_of_the_data_alone():
    """As for ImageNet-R, which has 200 of the 1,000 classes of a head."""

    class Constant(Stub):
        def logits(self, images):
            return torch.tensor([[3.0, 1.0, 2.0, 0.0]]).expand(len(images), -1)

    learned, task = ("cat", "dog", "fox", "owl"), get_task("classification")
    model = Constant(num_classes=4)
    scores = task.evaluate(model, Tokens(), Levels(("dog", "fox")), LOADING, learned)
    assert [prediction.output for prediction in scores.predictions] == ["fox"] * 8
    assert scores.scores["accuracy"].mean == 0.5
    assert scores.baselines["chance"] == {"accuracy": 0.5}
    with pytest.raises(DataError, match=r"answers: expected some among the 4 of the model"):
        task.evaluate(model, Tokens(), Levels(("elk",)), LOADING, learned)
