"""PiToMe and CrossGET: the official numbers, the definitions, and the effect of a text."""

import json
from pathlib import Path

import pytest
import torch

import elip_models
from elip_kernels.ops.gather_ops import cosines
from elip_models import CrossGET, PiToMe, ToMe
from elip_models.reduction.schedule import Stage
from elip_models.reduction.strategies.complete_graph import (
    Attention,
    merged,
    pairs_by_energy,
    pairs_by_importance,
)
from elip_models.towers import as_tower
from tests.helpers.towers import images, plain_vit, text

GOLDEN = Path(__file__).parents[1] / "golden"
CROSSGET = json.loads((GOLDEN / "crossget.json").read_text())
PITOME = json.loads((GOLDEN / "pitome.json").read_text())


def tensors(case, *names):
    return (torch.tensor(case[name], dtype=torch.float64) for name in names)


def groups(match):
    """Return the tokens of each row, for each image."""
    return [{tuple(row.nonzero()[:, 0].tolist()) for row in image} for image in match.source_map()]


def official_groups(case):
    return [set(map(tuple, image)) for image in case["groups"]]


@pytest.mark.parametrize("case", CROSSGET, ids=lambda case: f"r{case['r']}")
def test_crossget_reproduces_the_official_numbers(case):
    tokens, keys, query, sizes = tensors(case, "tokens", "keys", "query", "sizes")
    all_pairs = cosines(torch.cat([query[:, None], keys[:, 1:]], dim=1))
    pairs = pairs_by_importance(all_pairs[:, 1:, 1:], all_pairs[:, 0, 1:], case["r"]).behind(1)
    found = merged(tokens, sizes, pairs.match(tokens.shape[1]), pairs.weights)
    expected = tuple(tensors(case, "merged", "merged_sizes"))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("case", PITOME["functions"], ids=lambda case: f"m{case['margin']}")
def test_pitome_reproduces_the_official_numbers(case):
    tokens, keys, sizes = tensors(case, "tokens", "keys", "sizes")
    expected, expected_sizes = tensors(case, "merged", "merged_sizes")
    B, N, _ = tokens.shape
    r = N - expected.shape[1]
    pairs = pairs_by_energy(cosines(keys[:, 1:]), r, case["margin"]).behind(1)
    match = pairs.match(N)
    assert groups(match) == official_groups(case)
    found, total = merged(tokens, sizes, match, pairs.weights)
    for b in range(B):
        rows = match.slots[b, [group[0] for group in case["groups"][b]]].long()
        torch.testing.assert_close(found[b, rows], expected[b], atol=2e-6, rtol=1e-6)
        assert torch.equal(total[b, rows], expected_sizes[b])


def test_pitome_merges_as_a_tower_under_the_official_patch():
    for i, case in enumerate(PITOME["tower"]):
        (keys,) = tensors(case, "keys")
        tower, stage = as_tower(plain_vit(depth=4)), Stage(i, 1, len(case["groups"][0]) - 1)
        pairs = PiToMe(margin=0.75).choose(tower, stage, Attention(keys, keys, keys[:, None]), None)
        assert groups(pairs.match(keys.shape[1])) == official_groups(case)
        assert 0.75 * (1 - i / 4) == case["margin"]


def run(strategy, x, t=None, model=None):
    model = model or plain_vit().eval()
    return elip_models.encode_image(model, x, t, strategy=strategy, return_info=True)


@pytest.mark.parametrize("strategy", [PiToMe(5), CrossGET(5)], ids=lambda s: s.name)
def test_rows_are_weighted_sums(strategy):
    model, x, t = plain_vit(depth=2).eval().double(), images().double(), text().double()
    tokens, infos = run(strategy, x, t, model)
    tower, sizes = as_tower(model), None
    now = tower.embed(x)
    for i, info in enumerate(infos):
        bias = None if sizes is None else sizes.log()[:, None, None]
        now = tower.attend(i, now, bias)
        source = info.reduction.source_map().double()
        held = source if sizes is None else source * sizes[:, None]
        weight = held if info.weights is None else held * info.weights[:, None]
        now = tower.mlp(i, (weight @ now) / held.sum(2, keepdim=True))
        sizes = info.sizes
        torch.testing.assert_close(sizes, held.sum(2))
        assert source[:, 0].sum(1).eq(1).all()  # CLS
    torch.testing.assert_close(tower.finish(now), tokens)


def test_text_guides_crossget_alone():
    model, x, (one, other) = plain_vit().eval(), images(), text(4).split(2)

    def slots(strategy, t):
        return torch.cat([i.reduction.slots for i in run(strategy, x, t, model)[1]], dim=1)

    guided = CrossGET(4, fusion=0.0)
    assert not torch.equal(slots(guided, one), slots(guided, other))
    vision = CrossGET(4, fusion=1.0)
    assert torch.equal(slots(vision, one), slots(vision, None))
    assert torch.equal(slots(PiToMe(4), one), slots(PiToMe(4), other))


@pytest.mark.parametrize("kind", [PiToMe, CrossGET])
def test_r_zero_is_dense_and_any_other_r_merges_unlike_tome(kind):
    model, x, t = plain_vit().eval(), images(), text()
    assert torch.equal(run(kind(0), x, t, model)[0], model.forward_features(x))
    plain = run(ToMe(4), x, t, model)[0]
    assert not torch.allclose(run(kind(4), x, t, model)[0][:, 0], plain[:, 0])
