"""The strategies that select image tokens for a language model."""

import pytest
import torch
from torch.nn import functional as F

import elip_models
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy
from elip_models.vlm.strategies.cdpruner import CDPruner, scaled
from elip_models.vlm.strategies.controls import Pool, Stride
from elip_models.vlm.strategies.diverse import Diverse
from elip_models.vlm.strategies.evs import EVS
from elip_models.vlm.strategies.layer_strategy import FastV
from elip_models.vlm.strategies.visionzip import VisionZip, choose

BEFORE = [name for name, cls in LANGUAGE_STRATEGIES.items() if issubclass(cls, ImageTokenStrategy)]


def test_no_name_is_that_of_an_image_strategy():
    assert elip_models.LANGUAGE_STRATEGIES is LANGUAGE_STRATEGIES
    assert LANGUAGE_STRATEGIES.keys().isdisjoint(elip_models.STRATEGIES)
    assert all(strategy.name == name for name, strategy in LANGUAGE_STRATEGIES.items())


@pytest.mark.parametrize("number", range(20))
def test_cdpruner_keeps_the_tokens_that_the_official_code_keeps(golden, number):
    tensors = golden("cdpruner")
    tokens, kept = tensors[f"{number}/tokens"], tensors[f"{number}/kept"]
    relevance = scaled(tensors[f"{number}/relevance"])
    chosen = CDPruner.choose(tokens, len(kept), relevance)
    assert chosen[0].sort().values.tolist() == kept.tolist()


@pytest.mark.parametrize("number", range(20))
def test_visionzip_keeps_and_merges_what_the_official_code_does(golden, number):
    case = golden("visionzip").under(f"{number}/")
    attention, keys, hidden = case["attention"], case["keys"], case["hidden"]
    means = case["contextual"].shape[1]
    dominant, targets, others, nearest = choose(attention, keys, case["dominant"].shape[1], means)
    assert dominant.sort().values.tolist() == case["dominant"].sort().values.tolist()
    for image in range(len(hidden)):
        for i, target in enumerate(targets[image]):
            merged = hidden[image, others[image][nearest[image] == i]]
            mean = merged.mean(0) if len(merged) else 0
            torch.testing.assert_close(
                hidden[image, target] + mean, case["contextual"][image, i], atol=1e-5, rtol=0
            )


def test_visionzip_averages_the_features_behind_the_projector():
    tokens = torch.randn(2, 25, 8, dtype=torch.float64)
    context = ImageContext(attention=torch.rand(2, 25), keys=torch.randn(2, 25, 4))
    positions, values = VisionZip(contextual=0.25).reduce(tokens, 8, context)
    dominant, targets, others, nearest = choose(context.attention, context.keys, 6, 2)
    assert positions[:, 6:].tolist() == targets.tolist()
    for image in range(2):
        for i, target in enumerate(targets[image]):
            group = [target, *others[image][nearest[image] == i]]
            expected = tokens[image, torch.stack(group)].mean(0)
            torch.testing.assert_close(values[image, 6 + i], expected)
        assert torch.equal(values[image, :5], tokens[image, dominant[image, :5]])


def test_diverse_is_greedy_max_min():
    tokens = torch.randn(2, 20, 8, dtype=torch.float64)
    chosen = Diverse().select(tokens, 6, ImageContext())
    unit = F.normalize(tokens, dim=-1)
    cosine = unit @ unit.mT
    for image, order in zip(cosine, chosen.tolist(), strict=True):
        alone = image.clone().fill_diagonal_(-2)
        assert order[0] == alone.max(1).values.argmin()
        for i in range(1, 6):
            nearest = image[:, order[:i]].max(1).values
            nearest[order[:i]] = 2
            assert order[i] == nearest.argmin()


def test_diverse_with_relevance_begins_at_the_token_most_similar_to_the_text():
    tokens, question = torch.randn(3, 20, 8), torch.randn(3, 8)
    chosen = Diverse(relevance=True).select(tokens, 4, ImageContext(question))
    best = F.cosine_similarity(tokens, question[:, None], dim=-1).argmax(1)
    assert chosen[:, 0].tolist() == best.tolist()


def test_evs_keeps_the_first_frame_and_the_largest_changes():
    tokens = torch.randn(2, 4, 3, 8)  # frames of three tokens
    tokens[:, 2] = tokens[:, 1]
    tokens[:, 3, 1] = tokens[:, 2, 1]
    tokens[0, 2, 2] *= 3  # a longer vector is no change of direction
    chosen = EVS().select(tokens.flatten(1, 2), 8, ImageContext(frame=3))
    assert chosen[:, :3].tolist() == [[0, 1, 2]] * 2
    for image, order in zip(tokens, chosen.tolist(), strict=True):
        distance = {
            3 * t + i: 1 - F.cosine_similarity(image[t, i], image[t - 1, i], dim=0)
            for t in range(1, 4)
            for i in range(3)
        }
        assert order[3:] == sorted(distance, key=lambda i: -distance[i])[:5]
    few = EVS().select(tokens.flatten(1, 2), 2, ImageContext(frame=3))
    assert few.tolist() == [[0, 2]] * 2


def test_tokens_that_have_to_stay_take_the_places_of_the_least_important():
    context = ImageContext(frame=4, always=(3, 7, 11))
    positions, _ = Stride().reduce(torch.randn(1, 12, 8), 6, context)
    assert sorted(positions[0].tolist()) == [1, 3, 5, 7, 9, 11]
    positions, _ = EVS().reduce(torch.randn(1, 12, 8), 6, context)
    assert {0, 1, 2, 3, 7, 11} == set(positions[0].tolist())


def test_stride_keeps_the_last_token_of_equal_parts():
    chosen = Stride(keep=4).select(torch.randn(1, 12, 8), 4, ImageContext())
    assert chosen.tolist() == [[2, 5, 8, 11]]


def test_pool_averages_the_areas_of_a_square_grid():
    tokens = torch.randn(2, 16, 8, dtype=torch.float64)
    pool = Pool(keep=0.3)
    assert pool.count(16) == 4
    positions, means = pool.reduce(tokens, 4, ImageContext())
    assert positions[0].tolist() == [5, 7, 13, 15]
    grid = tokens.view(2, 4, 4, 8)
    torch.testing.assert_close(means[:, 1], grid[:, :2, 2:].mean((1, 2)), atol=1e-6, rtol=0)
    assert Pool(keep=1.0).count(15) == 15  # nothing is averaged
    with pytest.raises(ValueError, match="square number of tokens for 'pool', got 15"):
        pool.count(15)


@pytest.mark.parametrize("name", BEFORE)
def test_every_strategy_keeps_the_last_token_and_does_not_depend_on_the_batch(name):
    strategy = LANGUAGE_STRATEGIES[name](keep=0.25)
    tokens = torch.randn(4, 36, 8)
    context = ImageContext(torch.randn(4, 8), torch.rand(4, 36), torch.randn(4, 36, 8), frame=12)
    torch.manual_seed(1)
    positions, values = strategy.reduce(tokens, 9, context)
    assert positions.shape == (4, 9)
    assert (positions == 35).sum(1).tolist() == [1] * 4
    assert all(len(set(row)) == 9 for row in positions.tolist())
    if name != "random_tokens":
        third = ImageContext(*(values[2:3] for values in context[:3]), frame=12)
        alone, alone_values = strategy.reduce(tokens[2:3], 9, third)
        assert alone[0].tolist() == positions[2].tolist()
        if values is not None:
            assert torch.equal(alone_values[0], values[2])


@pytest.mark.parametrize(
    ("keep", "count"), [(0.25, 9), (1.0, 36), (2, 2), (5, 5), (100, 36), (0.001, 1)]
)
def test_keep_is_a_share_or_a_number(keep, count):
    assert Stride(keep=keep).count(36) == count
    assert FastV(layer=2, keep=keep).kept(36, num_layers=4) == (36, 36, count, count)


@pytest.mark.parametrize("keep", [0, 0.0, 1, True, 1.5, -1, "half"])
def test_every_wrong_keep_is_refused_with_the_same_requirement(keep):
    requirement = (
        r"^keep: expected a float in \(0, 1\] for a share of the tokens, or an int of at least 2 "
        f"for their number, got {keep!r}.*; pass {'1.0' if keep in (1, True) else '0.5'} for "
    )
    with pytest.raises((TypeError, ValueError), match=requirement):
        Stride(keep=keep)
