"""Retrieval by features: recall by its definition, ties, chance, and encoding without text."""

import json
import math
import random

import pytest
import torch

from elip_models.images import SampleError
from elip_models.intervals import score_interval
from elip_models.pretraining.data import DataError, EmojiScenes, JsonSource, train_tokenizer
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.tasks.retrieval import (
    chance_level,
    evaluate_retrieval,
    recall_at_k,
    recall_intervals,
    recall_of_features,
)


def recall_by_definition(similarity, text_to_image, k, way):
    """Sort the candidates, wrong ones first in a tie; look for a correct one among the first k."""
    rows = similarity.tolist()
    owners = text_to_image.tolist()
    num_images, num_texts = len(rows), len(owners)
    if way == "image_to_text":
        queries = [
            [(rows[i][t], owners[t] == i) for t in range(num_texts)] for i in range(num_images)
        ]
    else:
        queries = [
            [(rows[i][t], owners[t] == i) for i in range(num_images)] for t in range(num_texts)
        ]
    hits = [
        any(right for _, right in sorted(query, key=lambda c: (-c[0], c[1]))[:k])
        for query in queries
    ]
    return sum(hits) / len(hits)


def captions_of_images(num_images, seed):
    """Return one to four captions per image, in mixed order."""
    owners = [i for i in range(num_images) for _ in range(1 + (i + seed) % 4)]
    random.Random(seed).shuffle(owners)
    return torch.tensor(owners)


@pytest.mark.parametrize("levels", [2, 5, None], ids=["many-ties", "ties", "no-ties"])
@pytest.mark.parametrize("num_images", [1, 7, 40])
def test_recall_equals_its_definition(num_images, levels):
    text_to_image = captions_of_images(num_images, seed=num_images)
    similarity = torch.rand(num_images, len(text_to_image), dtype=torch.float64)
    if levels:
        similarity = (similarity * levels).floor()
    recalls = recall_at_k(similarity, text_to_image, ks=(1, 3, 10))
    for name, recall in recalls.items():
        way, k = name.rsplit("_r", 1)
        expected = recall_by_definition(similarity, text_to_image, int(k), way)
        assert recall == pytest.approx(expected), name


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_change_nothing(chunk_size):
    text_to_image = captions_of_images(20, seed=0)
    images = torch.randn(20, 8)
    texts = images[text_to_image] + 1.5 * torch.randn(len(text_to_image), 8)
    whole = recall_at_k(images @ texts.T, text_to_image)
    assert 0 < whole["image_to_text_r1"] < 1
    assert recall_of_features(images, texts, text_to_image, chunk_size=chunk_size) == whole


def test_constant_similarities_score_zero():
    text_to_image = captions_of_images(50, seed=1)
    images = torch.nn.functional.normalize(torch.randn(1, 96), dim=-1).expand(50, -1)
    texts = images[text_to_image]
    assert set(recall_of_features(images, texts, text_to_image).values()) == {0.0}


@pytest.mark.parametrize(("gap", "recall"), [(0.0, 0.0), (5e-7, 0.0), (2e-6, 1.0)])
def test_a_tie_within_the_tolerance_counts_against_the_model(gap, recall):
    """Each image is as similar to the text of the other one, but for `gap`."""
    similarity = torch.tensor([[1.0, 1.0 - gap], [1.0 - gap, 1.0]], dtype=torch.float64)
    recalls = recall_at_k(similarity, torch.arange(2), ks=(1, 2))
    assert recalls["image_to_text_r1"] == recalls["text_to_image_r1"] == recall
    assert recalls["image_to_text_r2"] == recalls["text_to_image_r2"] == 1.0


def test_captions_of_an_image_are_drawn_together():
    owners = captions_of_images(30, seed=1)
    of_image = torch.arange(30) % 2
    intervals = recall_intervals(of_image, of_image[owners], owners, ks=(1,))
    hits = (of_image[owners] < 1).numpy()
    assert intervals["text_to_image_r1"] == score_interval(hits, owners.numpy())
    assert intervals["image_to_text_r1"] == score_interval((of_image < 1).numpy())
    alone = score_interval(hits)
    assert intervals["text_to_image_r1"].mean == alone.mean == hits.mean()
    assert intervals["text_to_image_r1"].low < alone.low
    assert intervals["text_to_image_r1"].high > alone.high


def test_nan_scores_zero():
    text_to_image = captions_of_images(20, seed=1)
    features = torch.full((20, 4), math.nan)
    recalls = recall_of_features(features, features[text_to_image], text_to_image)
    assert set(recalls.values()) == {0.0}


@pytest.mark.parametrize("k", [1, 5, 10, 1000])
def test_chance_is_what_a_random_ranking_reaches(k):
    text_to_image = captions_of_images(30, seed=2)
    chance = chance_level(text_to_image, 30, ks=(k,))
    trials = [
        recall_at_k(torch.rand(30, len(text_to_image)), text_to_image, ks=(k,)) for _ in range(200)
    ]
    for name, expected in chance.items():
        mean = sum(trial[name] for trial in trials) / len(trials)
        assert mean == pytest.approx(expected, abs=0.02), name


@pytest.mark.parametrize(
    ("similarity", "text_to_image", "ks", "error", "message"),
    [
        ([[1.0]], torch.arange(1), (1,), TypeError, "similarity: expected a floating.*got list"),
        (torch.eye(2).long(), torch.arange(2), (1,), TypeError, "similarity: .*got torch.int64"),
        (torch.rand(3), torch.arange(3), (1,), ValueError, r"similarity: .*got \(3,\)"),
        (torch.rand(3, 4), torch.arange(3), (1,), ValueError, r"text_to_image: expected \(4,\)"),
        (torch.rand(3, 3), torch.rand(3), (1,), TypeError, "text_to_image: .*got torch.float32"),
        (torch.rand(3, 3), [0, 1, 2], (1,), TypeError, "text_to_image: .*got list"),
        (torch.rand(3, 3), torch.tensor([0, 1, 1]), (1,), ValueError, "each of the 3 images"),
        (torch.rand(2, 3), torch.tensor([0, 1, 2]), (1,), ValueError, "each of the 2 images"),
        (torch.rand(2, 2), torch.arange(2), (1, 0), ValueError, "ks: .* at least 1, got 0"),
        (torch.rand(2, 2), torch.arange(2), (1.0,), TypeError, "ks: .* at least 1, got 1.0"),
    ],
)
def test_bad_input_is_named(similarity, text_to_image, ks, error, message):
    with pytest.raises(error, match=message):
        recall_at_k(similarity, text_to_image, ks)


@pytest.mark.parametrize(
    ("text_features", "chunk_size", "message"),
    [
        (torch.rand(3, 5), 8, r"text_features: expected \(\.\., 4\), got \(3, 5\)"),
        (torch.rand(3, 4), 0, "chunk_size: expected an integer at least 1, got 0"),
    ],
)
def test_bad_features_are_named(text_features, chunk_size, message):
    with pytest.raises(ValueError, match=message):
        recall_of_features(torch.rand(3, 4), text_features, torch.arange(3), chunk_size=chunk_size)


def test_a_list_of_pairs_is_scored_as_the_list_of_its_images(model, tokenizer, scenes, tmp_path):
    images, pairs = [], []
    for number in range(12):
        scenes[number].image.save(tmp_path / f"{number}.png")
        entry = {"image": f"{number}.png", "caption": list(scenes.captions(number))}
        images.append(entry)
        pairs += [entry | {"caption": caption} for caption in entry["caption"]]
    random.Random(0).shuffle(pairs)
    scores = []
    for name, entries in (("images", images), ("pairs", pairs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        source = JsonSource(tmp_path / f"{name}.json")
        scores.append(evaluate_retrieval(model, tokenizer, source, batch_size=5))
    assert scores[1] == scores[0]
    assert (scores[1].num_images, scores[1].num_texts) == (12, 60)


class Damaged:
    """A source whose samples at `bad` cannot be read."""

    def __init__(self, source, bad):
        self.source, self.bad = source, bad

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.bad:
            raise SampleError(f"sample {index}", "damaged")
        return self.source[index]

    def captions(self, index):
        return self.source.captions(index)


@pytest.fixture(scope="module")
def scenes():
    return EmojiScenes(12, seed=5, image_size=64)


@pytest.fixture(scope="module")
def tokenizer(scenes):
    return train_tokenizer((text for i in range(12) for text in scenes.captions(i)), 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return create_model(
        "clip_tiny",
        vision_depth=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def test_evaluation_encodes_images_without_captions(model, tokenizer, scenes, monkeypatch):
    seen = []
    encode_image = model.encode_image
    monkeypatch.setattr(
        model,
        "encode_image",
        lambda *args, **kwargs: seen.append((args, kwargs)) or encode_image(*args),
    )
    scores = evaluate_retrieval(model, tokenizer, scenes, batch_size=5)
    assert [len(args) for args, _ in seen] == [1, 1, 1]
    assert not any(kwargs for _, kwargs in seen)
    assert (scores.num_images, scores.num_texts, scores.num_skipped) == (12, 60, 0)
    assert scores.recalls.keys() == scores.chance.keys() == scores.intervals.keys()
    assert {name: each.mean for name, each in scores.intervals.items()} == scores.recalls
    assert all(each.low < each.high for each in scores.intervals.values())
    assert scores.chance["text_to_image_r1"] == pytest.approx(1 / 12)


def test_evaluation_does_not_depend_on_the_batch_and_leaves_mode_and_randomness(
    model, tokenizer, scenes
):
    model.train()
    before = torch.get_rng_state()
    first = evaluate_retrieval(model, tokenizer, scenes, batch_size=5)
    assert evaluate_retrieval(model, tokenizer, scenes, batch_size=12) == first
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_reduction_does_not_change_the_random_state(tokenizer, scenes, model):
    drawn = create_model("clip_tiny", **vars(model.config) | {"strategy": "random"})
    before = torch.get_rng_state()
    evaluate_retrieval(drawn, tokenizer, scenes)
    assert torch.equal(torch.get_rng_state(), before)


def test_unreadable_samples_are_left_out_and_counted(model, tokenizer, scenes):
    source = Damaged(scenes, {0, 7})
    scores = evaluate_retrieval(model, tokenizer, source, batch_size=4, max_bad_share=0.5)
    assert (scores.num_images, scores.num_texts, scores.num_skipped) == (10, 50, 2)


def test_too_many_unreadable_samples_stop_the_evaluation(model, tokenizer, scenes):
    with pytest.raises(DataError, match="sample 0"):
        evaluate_retrieval(model, tokenizer, Damaged(scenes, set(range(6))), batch_size=4)
