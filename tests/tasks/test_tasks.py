"""Downstream tasks: training samples, and scores of models with known outputs."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from elip_models.data import DataError, Example, MixedSource, Sample
from elip_models.tasks.registry import TASKS, get_task
from elip_models.tasks.retrieval_task import Retrieval
from elip_models.tasks.task import Loading, Preprocessor, evaluation_transform
from elip_models.tasks.vqa import VQA

LOADING = Loading(batch_size=3)
SIZE = 8


def grey(value):
    return Image.new("RGB", (SIZE, SIZE), (value, value, value))


class Greys:
    """Examples of images with one grey level each."""

    answers = ("dark", "bright")

    def __init__(self, images=1):
        self.images = images

    def __len__(self):
        return 8

    def text_alone(self, index):
        right = self.answers[index % 2]
        return Example((), f"how is {index}", {right: 0.7, "grey": 0.1}, f"g{index}")

    def __getitem__(self, index):
        image = grey(200 if index % 2 else 20)
        return self.text_alone(index)._replace(images=(image,) * self.images)


class Captioned:
    """Images of six grey levels, with two captions each."""

    def __len__(self):
        return 6

    def captions(self, index):
        return (f"grey {index}", f"number {index}")

    def __getitem__(self, index):
        return Sample(grey(40 * index), self.captions(index), f"c{index}")


class Tokens:
    """Tokenizer of the digits in a text."""

    pad_token_id = 0

    def __call__(self, texts, *, max_length, **options):
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in enumerate(texts):
            for place, digit in enumerate([c for c in text if c.isdigit()][:max_length]):
                ids[row, place] = int(digit) + 1
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Config:
    image_size, resize, captions, context_length = SIZE, "squash", "plain", 4
    reads_guide_captions = False


class Stub(nn.Module):
    """Model with outputs computed from pixels and digits; its features are constant."""

    ranks = True

    def __init__(self, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (Config,), config)
        self.guides = []

    def tokenise(self, tokenizer, texts):
        return tokenizer(texts, max_length=self.config.context_length)

    def logits(self, images, input_ids, attention_mask):
        level = images.flatten(1).mean(1)
        return torch.stack([-level, level], dim=1)

    def rank_answers(self, images, input_ids, attention_mask, answer_ids, answer_mask, k):
        self.asked = answer_ids.shape, k
        return self.logits(images, input_ids, attention_mask).argmax(1)

    def matching_tokens(self, images, text_cls=None):
        self.guides.append(text_cls)
        return images.flatten(2).transpose(1, 2), None

    def project_image(self, tokens):
        return torch.ones(len(tokens), 2)

    def text_features(self, input_ids, attention_mask):
        return torch.ones(len(input_ids), 2)

    def text_cls(self, input_ids, attention_mask):
        return input_ids[:, :1].float()

    def matching_logits(self, tokens, image_mask, input_ids, attention_mask):
        levels = torch.linspace(float(self.low), float(self.high), 6)
        return -(tokens.mean((1, 2)) - levels[input_ids[:, 0] - 1]).abs()


def preprocessor(source, **config):
    return Preprocessor(source, pixels, Tokens(), Stub(**config).config, 4)


def pixels(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float()


def test_every_task_is_made_by_name_and_wrong_settings_are_named():
    assert [get_task(name).name for name in TASKS] == list(TASKS)
    with pytest.raises(ValueError, match=r"task: expected one of retrieval, .*did you mean 'vqa'"):
        get_task("vqaa")
    with pytest.raises(ValueError, match=r"task_options: .*candidates.*got 'beams'"):
        get_task("vqa", beams=3)
    with pytest.raises(ValueError, match="candidates: expected an integer at least 1, got 0"):
        get_task("vqa", candidates=0)


@pytest.mark.parametrize(("task", "images"), [("entailment", 1), ("nlvr2", 2)])
def test_a_sample_of_classes_has_images_text_and_the_number_of_the_answer(task, images):
    source, rng = Greys(images), np.random.default_rng(0)
    sample = get_task(task).sample(preprocessor(source), source[3], 3, rng)
    shape = (3, SIZE, SIZE) if images == 1 else (2, 3, SIZE, SIZE)
    assert sample["images"].shape == shape and sample["labels"] == 1
    assert sample["input_ids"].tolist() == [4, 0, 0, 0]


def test_an_image_is_classified_without_a_text():
    source = Greys()
    sample = get_task("classification").sample(
        preprocessor(source, num_classes=2), source[0], 0, np.random.default_rng(0)
    )
    assert sample.keys() == {"images", "labels"}


def test_answers_are_generated_with_weights_or_classified_with_scores():
    source, rng = Greys(), np.random.default_rng(0)
    task = VQA(answers_per_question=3, answer_length=5)
    written = task.sample(preprocessor(source), source[1], 1, rng)
    assert written["answer_ids"].shape == written["answer_mask"].shape == (3, 5)
    assert written["answer_weights"].tolist() == pytest.approx([0.7, 0.1, 0.0])
    classified = task.sample(preprocessor(source, num_classes=2), source[1], 1, rng)
    assert classified["answer_scores"].tolist() == [0.0, 1.0]


def test_an_evaluation_reports_samples_texts_and_queries():
    calls = []
    loading = LOADING._replace(progress=lambda *call: calls.append(call))
    VQA().evaluate(Stub(), Tokens(), Greys(), loading)
    assert calls == [("sample", done, 8) for done in (0, 3, 6, 8)]
    calls.clear()
    model, source = matcher()
    Retrieval().evaluate(model, Tokens(), source, loading)
    assert calls[:3] == [("sample", done, 6) for done in (0, 3, 6)]
    assert calls[3:7] == [("text", done, 12) for done in (3, 6, 9, 12)]
    assert calls[7:] == [("query", done, 18) for done in range(1, 19)]


@pytest.mark.parametrize("config", [{}, {"num_classes": 2}])
def test_a_correct_model_scores_1_and_its_predictions_are_stored(config, tmp_path):
    scores = VQA(candidates=9).evaluate(Stub(**config), Tokens(), Greys(), LOADING)
    assert scores.scores["accuracy"] == (1.0, 1.0, 1.0)
    assert scores.baselines == {"chance": {"accuracy": 0.5}, "majority": {"accuracy": 0.5}}
    assert [each.output for each in scores.predictions] == ["dark", "bright"] * 4
    assert scores.summary() == "vqa: accuracy 100.0%"
    written = json.loads(scores.write(tmp_path / "scores.json").read_text())
    assert written["scores"]["accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert written["predictions"][0] == {"id": "g0", "output": "dark", "score": 1.0}


def test_a_model_with_another_number_of_answers_than_the_data_is_refused():
    with pytest.raises(DataError, match=r"answers: expected 3, one for each output.*got the 2 of"):
        VQA().evaluate(Stub(num_classes=3), Tokens(), Greys(), LOADING)
    learned = ("dark", "bright", "grey")
    scores = VQA().evaluate(Stub(num_classes=3), Tokens(), Greys(), LOADING, learned)
    assert scores.baselines["chance"] == {"accuracy": 1 / 3}


def test_data_without_any_answer_of_the_model_is_refused():
    with pytest.raises(
        DataError, match=r"among the 2 .* such as 'yes', got none of them, but 'dar"
    ):
        VQA().evaluate(Stub(num_classes=2), Tokens(), Greys(), LOADING, ("yes", "no"))


def test_examples_with_the_same_id_are_all_scored():
    class SameId(Greys):
        def text_alone(self, index):
            return super().text_alone(index)._replace(id=str(index % 2))

    scores = get_task("entailment").evaluate(Stub(), Tokens(), SameId(), LOADING)
    assert scores.num_examples == len(scores.predictions) == 8


@pytest.mark.parametrize("task", ["entailment", "retrieval"])
def test_a_random_model_does_not_change_the_random_state(task):
    class Drawing(Stub):
        def logits(self, *inputs, **named):
            return super().logits(*inputs, **named) + torch.rand(1)

        def matching_logits(self, *inputs):
            return torch.rand(len(inputs[0]))

    source, before = {"retrieval": Captioned()}.get(task, Greys()), torch.get_rng_state()
    get_task(task).evaluate(Drawing(), Tokens(), source, LOADING)
    assert torch.equal(torch.get_rng_state(), before)


def test_answers_are_normalised_before_comparison():
    class Written(Greys):
        answers = ("Two dogs.", "a cat")

        def text_alone(self, index):
            return super().text_alone(index)._replace(answers={"2 dogs": 0.2, "two dogs": 0.8})

    source, model = Written(), Stub(num_classes=2)
    scores = VQA().evaluate(model, Tokens(), source, LOADING)
    assert [each.score for each in scores.predictions] == [1.0, 0.0] * 4
    sample = VQA().sample(
        preprocessor(source, num_classes=2), source[0], 0, np.random.default_rng(0)
    )
    assert sample["answer_scores"].tolist() == [1.0, 0.0]


def test_candidates_are_at_most_the_listed_answers():
    model = Stub()
    VQA(candidates=9, answer_length=6).evaluate(model, Tokens(), Greys(), LOADING)
    assert model.asked == ((2, 6), 2)


def test_a_retrieval_sample_has_its_image_id_and_the_false_texts_of_the_model():
    source, rng = Captioned(), np.random.default_rng(0)
    sample = Retrieval().sample(preprocessor(source), source[2], 2, rng)
    assert sample["image_ids"] == 2 and "false_ids" not in sample
    sample = Retrieval().sample(preprocessor(source, false_texts=5), source[2], 2, rng)
    assert sample["false_ids"].shape == sample["false_mask"].shape == (5, 4)
    assert not (sample["false_ids"][:, 0] == 3).any()  # of other images


class Pairs(Captioned):
    """A sample a caption, the images of `Captioned` in turn."""

    def __len__(self):
        return 12

    def image_number(self, index):
        return index % 6

    def captions(self, index):
        return super().captions(index % 6)[index // 6 :][:1]

    def __getitem__(self, index):
        return super().__getitem__(index % 6)._replace(captions=self.captions(index))


def test_pairs_of_the_same_image_are_not_negatives():
    source, rng = Pairs(), np.random.default_rng(0)
    sample = Retrieval().sample(preprocessor(source, false_texts=40), source[8], 8, rng)
    assert sample["image_ids"] == 2
    assert not (sample["false_ids"][:, 0] == 3).any()
    mixed = MixedSource([Captioned(), source])
    assert Retrieval().sample(preprocessor(mixed), mixed[14], 14, rng)["image_ids"] == 6 + 2


@pytest.mark.parametrize("size", [1, 3])
def test_one_image_alone_has_no_false_texts(size):
    class Alone(Pairs):
        def __len__(self):
            return size

        def image_number(self, index):
            return 0

    source, rng = Alone(), np.random.default_rng(0)
    with pytest.raises(DataError, match="false_texts: expected captions of other images, got 0"):
        Retrieval().sample(preprocessor(source, false_texts=2), source[0], 0, rng)


def test_images_of_pairs_are_ranked_once_with_all_their_captions():
    model, _ = matcher()
    found = Retrieval(candidates=12).evaluate(model, Tokens(), Pairs(), LOADING)
    assert found.num_examples == 6
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1


def test_another_caption_guides_if_the_model_uses_guide_captions():
    source, rng = Captioned(), np.random.default_rng(0)
    sample = Retrieval().sample(preprocessor(source, reads_guide_captions=True), source[2], 2, rng)
    assert sample["guide_ids"].shape == sample["guide_mask"].shape == (4,)


def matcher():
    model, source = Stub(), Captioned()
    transform = evaluation_transform(model)
    model.low = transform(source[0].image).mean()
    model.high = transform(source[5].image).mean()
    return model, source


def test_matching_reranks_candidates_with_equal_features():
    model, source = matcher()
    found = Retrieval(candidates=12).evaluate(model, Tokens(), source, LOADING)
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1
    assert found.baselines["features"]["text_to_image_r1"] == 0  # all alike: ties count against it
    assert found.baselines["chance"]["text_to_image_r1"] == pytest.approx(1 / 6)
    assert [each.score for each in found.predictions] == [1.0] * 6
    few = Retrieval(candidates=1).evaluate(model, Tokens(), source, LOADING)
    assert few.scores["text_to_image_r1"].mean == pytest.approx(1 / 6)  # the first image's alone


def test_features_are_compared_in_fp32_also_under_autocast():
    """Angles of 0.05 between the first and the last: in bf16 all are equal."""
    model, source = matcher()

    def angle(share):
        return torch.stack([(0.05 * share).cos(), (0.05 * share).sin()], dim=1)

    low, high = float(model.low), float(model.high)
    model.project_image = lambda tokens: angle((tokens.mean((1, 2)) - low) / (high - low))
    model.text_features = lambda input_ids, attention_mask: angle((input_ids[:, 0] - 1) / 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = Retrieval(candidates=1).evaluate(model, Tokens(), source, LOADING)
    assert found.scores["text_to_image_r1"].mean == 1


def test_a_model_without_features_scores_every_pair():
    model, source = matcher()
    model.ranks = False
    found = Retrieval(candidates=1).evaluate(model, Tokens(), source, LOADING)
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1
    assert found.baselines.keys() == {"chance"}


def test_a_model_without_matching_ranks_by_features():
    class Features:  # of an image its level, of a text that of its digit
        ranks = True

        def __init__(self):
            self.stub, _ = matcher()
            self.config, self.text_cls = self.stub.config, self.stub.text_cls

        def __getattr__(self, name):
            if name.startswith("matching"):
                raise AttributeError(name)
            return getattr(self.stub, name)

        def image_features(self, images):
            level = images.mean((1, 2, 3))
            low, high = float(self.stub.low), float(self.stub.high)
            return angle((level - low) / (high - low))

        def text_features(self, input_ids, attention_mask):
            return angle((input_ids[:, 0] - 1) / 5)

    def angle(share):
        return torch.stack([share.cos(), share.sin()], dim=1)

    found = Retrieval().evaluate(Features(), Tokens(), Captioned(), LOADING)
    assert found.scores["image_to_text_r1"].mean == found.scores["text_to_image_r1"].mean == 1
    assert found.baselines.keys() == {"chance"}


def test_index_images_are_encoded_without_text_and_queries_guide_only_candidates():
    model, source = matcher()
    Retrieval(candidates=4).evaluate(model, Tokens(), source, LOADING)
    assert model.guides == [None] * math.ceil(len(source) / LOADING.batch_size)
    model.guides.clear()
    Retrieval(candidates=2, guided=True).evaluate(model, Tokens(), source, LOADING)
    index, queries = model.guides[:2], model.guides[2:]
    assert index == [None, None]
    # Images look for texts first, by the index; then each text guides the two images it may fit.
    expected = [float(image + 1) for image in range(6) for _ in range(2)]
    assert [guide.flatten().tolist() for guide in queries] == [[text] * 2 for text in expected]
