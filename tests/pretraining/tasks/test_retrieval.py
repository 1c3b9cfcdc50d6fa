"""Retrieval: recall by its definition, ties, chance, re-ranking, and what guides which images."""

import math
import random

import numpy as np
import pytest
import torch

from elip_models.analysis import ranking
from elip_models.pretraining.data import (
    EmojiScenes,
    MixedSource,
    train_tokenizer,
)
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.tasks.retrieval import (
    Retrieval,
    chance_level,
    recall_at_k,
)
from elip_models.pretraining.tasks.task import Loading
from tests.helpers.task_cases import LOADING, Captioned, Tokens, matcher, preprocessor


def recall_by_definition(similarity, owners, k):
    """Sort the candidates of each query, wrong ones first in a tie; look among the first k."""
    hits = []
    for scores, right in zip(similarity.tolist(), owners.tolist(), strict=True):
        ranked = sorted(zip(scores, right, strict=True), key=lambda c: (-c[0], c[1]))
        hits.append(any(is_right for _, is_right in ranked[:k]))
    return sum(hits) / len(hits)


def captions_of_images(num_images, seed):
    """Return one to four captions per image, in mixed order."""
    owners = [i for i in range(num_images) for _ in range(1 + (i + seed) % 4)]
    random.Random(seed).shuffle(owners)
    return torch.tensor(owners)


@pytest.mark.parametrize("levels", [2, 5, None], ids=["many-ties", "ties", "no-ties"])
@pytest.mark.parametrize("num_images", [1, 7, 40])
def test_recall_equals_its_definition(num_images, levels, monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", 3)  # queries that are ranked at once
    text_to_image = captions_of_images(num_images, seed=num_images)
    similarity = torch.rand(num_images, len(text_to_image), dtype=torch.float64)
    if levels:
        similarity = (similarity * levels).floor()
    relevant = torch.arange(num_images)[:, None] == text_to_image
    texts = torch.eye(len(text_to_image), dtype=torch.float64)
    recalls = recall_at_k(similarity, texts, text_to_image, ks=(1, 3, 10))
    for k in (1, 3, 10):
        of_images = recall_by_definition(similarity, relevant, k)
        of_texts = recall_by_definition(similarity.T, relevant.T, k)
        assert recalls[f"image_to_text_r{k}"] == pytest.approx(of_images)
        assert recalls[f"text_to_image_r{k}"] == pytest.approx(of_texts)


@pytest.mark.parametrize(("gap", "recall"), [(0.0, 0.0), (5e-7, 0.0), (2e-6, 1.0), (math.nan, 0.0)])
def test_a_tie_within_the_tolerance_counts_against_the_model(gap, recall):
    """Each image is as similar to the text of the other one, but for `gap`."""
    similarity = torch.tensor([[1.0, 1.0 - gap], [1.0 - gap, 1.0]], dtype=torch.float64)
    texts = torch.eye(2, dtype=torch.float64)
    recalls = recall_at_k(similarity, texts, torch.arange(2), ks=(1, 2))
    assert recalls["image_to_text_r1"] == recalls["text_to_image_r1"] == recall
    assert recalls["image_to_text_r2"] == recalls["text_to_image_r2"] == 1.0


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_chance_is_what_a_random_ranking_reaches(k):
    owners = captions_of_images(30, seed=2)
    texts = torch.eye(len(owners))
    trials = [recall_at_k(torch.rand(30, len(owners)), texts, owners, (k,)) for _ in range(200)]
    for name, expected in chance_level(owners, 30, ks=(k,)).items():
        mean = sum(trial[name] for trial in trials) / len(trials)
        assert mean == pytest.approx(expected, abs=0.02), name


BY_FEATURES = Retrieval(candidates=0)


@pytest.fixture(scope="module")
def scenes():
    return EmojiScenes(12, seed=5, image_size=64)


@pytest.fixture(scope="module")
def tokenizer(scenes):
    return train_tokenizer((text for i in range(12) for text in scenes.captions(i)), 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return create_model("clip_tiny", vision_depth=2, vocab_size=len(tokenizer), **ids)


def test_images_are_encoded_without_captions_whatever_the_batch(
    model, tokenizer, scenes, monkeypatch
):
    seen, encode_image = [], model.encode_image

    def recorded(*args, **kwargs):
        seen.append((args, kwargs))
        return encode_image(*args)

    monkeypatch.setattr(model, "encode_image", recorded)
    model.train()
    before = torch.get_rng_state()
    scores = BY_FEATURES.evaluate(model, tokenizer, scenes, Loading(5))
    assert [len(args) for args, _ in seen] == [1, 1, 1]
    assert not any(kwargs for _, kwargs in seen)
    assert scores.scores.keys() == scores.baselines["chance"].keys()
    assert all(recall.low < recall.high for recall in scores.scores.values())
    assert scores.baselines["chance"]["text_to_image_r1"] == pytest.approx(1 / 12)
    assert BY_FEATURES.evaluate(model, tokenizer, scenes, Loading(12)) == scores
    assert model.training and torch.equal(torch.get_rng_state(), before)


class Pairs(Captioned):
    """A sample a caption, the images of `Captioned` in turn; `images` is their number."""

    images = 6

    def __len__(self):
        return 12

    def image_number(self, index):
        return index % self.images

    def captions(self, index):
        return super().captions(index % 6)[index // 6 :][:1]

    def __getitem__(self, index):
        return super().__getitem__(index % 6)._replace(captions=self.captions(index))


def r1(scores):
    return scores.scores["image_to_text_r1"].mean, scores.scores["text_to_image_r1"].mean


def test_matching_reranks_candidates_with_equal_features():
    model, source = matcher()
    scores = Retrieval(candidates=12).evaluate(model, Tokens(), source, LOADING)
    assert r1(scores) == (1, 1)
    assert scores.baselines["features"]["text_to_image_r1"] == 0  # all alike: ties count against it
    assert scores.baselines["chance"]["text_to_image_r1"] == pytest.approx(1 / 6)
    assert [prediction.score for prediction in scores.predictions] == [1.0] * 6
    few = Retrieval(candidates=1).evaluate(model, Tokens(), source, LOADING)
    assert r1(few)[1] == pytest.approx(1 / 6)  # the first image's alone
    pairs = Retrieval(candidates=12).evaluate(model, Tokens(), Pairs(), LOADING)
    assert (pairs.num_examples, *r1(pairs)) == (6, 1, 1)


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


def sample_of(source, index, **config):
    rng = np.random.default_rng(0)
    return Retrieval().sample(preprocessor(source, **config), source[index], index, rng)


def test_pairs_of_the_same_image_are_not_negatives():
    sample = sample_of(Pairs(), 8, false_texts=40)
    assert sample["image_ids"] == 2
    assert not (sample["false_ids"][:, 0] == 3).any()
    assert sample_of(MixedSource([Captioned(), Pairs()]), 14)["image_ids"] == 6 + 2
