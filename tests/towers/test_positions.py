"""Towers whose blocks read positions: rotations, or a bias for each pair of positions."""

import pytest
import torch

import elip_kernels
import elip_models
from elip_models import EViT, ToMe
from elip_models.engine.forward_state import ForwardState
from elip_models.towers import as_tower
from tests.helpers.models import BIASED, ROTARY, TOWERS
from tests.helpers.tiers import tiered
from tests.helpers.towers import (
    SCHEDULE,
    WIDTH,
    assert_equal_gradients,
    gradients,
    gradients_of_a_step,
    images,
    text,
)

PLACED_BY_BIAS = {
    name: TOWERS[name] for name in ("timm BEiT", "timm relative positions", "HF Data2Vec")
} | BIASED


@pytest.fixture(params=ROTARY.values(), ids=ROTARY)
def model(request):
    return request.param().eval()


@torch.no_grad()
def test_parts_add_up_to_the_block(model):
    tower, close = as_tower(model), {"atol": 2e-5, "rtol": 2e-5}
    places = torch.stack([torch.randperm(36)[:20].sort().values for _ in range(2)])
    places[:, -1] = -1  # a merged token
    for at, n in ((None, tower.size.num_tokens), (places, tower.num_prefix_tokens + 20)):
        x, bound = tower.embed(images())[:, :n], tower.with_positions(at)
        for i in range(tower.depth):
            whole = bound.block(i, x)
            assert tower.is_plain(i)
            torch.testing.assert_close(bound.mlp(i, bound.attend(i, x)), whole, **close)
            torch.testing.assert_close(bound.cls_block(i, x, x[:, 0]), whole[:, 0], **close)
            row = bound.attention_map(i, x)[:, :, 0].mean(1)
            got = bound.cls_attention(i, x, x[:, 0])
            torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
            x = whole


def test_positions_follow_tokens_through_the_stages():
    model, x = ROTARY["DINOv3"]().eval(), images()
    _, infos = elip_models.encode_image(model, x, text(), schedule=SCHEDULE, return_info=True)
    places = torch.arange(36).expand(2, -1)
    for info in infos:
        kept = places.gather(1, info.reduction.kept - 5)
        places = torch.cat([kept, torch.full((2, 1), -1)], dim=1)  # the merged one: no place
        assert torch.equal(info.positions, places)


EXACT = {"schedule": SCHEDULE, "scorer": "exact"}
PLACED = {"elip": EXACT, "evit": {"strategy": "evit"}, "nearest": EXACT | {"merge": "nearest"}}
PLACED |= {"tome": {"strategy": "tome"}}


@pytest.mark.parametrize("how", tiered(PLACED, ["elip"]))
def test_checkpointing_replays_the_positions(model, how):
    x, t = images(), text()
    elip_models.reduce_(model.train(), **PLACED[how])
    expected = gradients_of_a_step(model, x, t)
    model.set_grad_checkpointing(True)
    got = gradients_of_a_step(model, x, t)
    assert_equal_gradients(got, expected, atol=1e-5, rtol=1e-4)
    elip_models.unreduce_(model)
    model.zero_grad()
    tokens = elip_models.encode_image(model, x, t, **PLACED[how])
    model.forward_head(tokens).square().sum().backward()
    assert_equal_gradients(gradients(model), expected, atol=1e-5, rtol=1e-4)


MERGES = {
    "tome": ToMe((9, 0, 12, 3, 0, 0)),
    "tome without norms": ToMe((9, 0, 12, 3, 0, 0), keep_norm=True, compare="tokens"),
}


@torch.no_grad()
@pytest.mark.parametrize("strategy", MERGES.values(), ids=MERGES)
def test_a_merged_token_stands_where_one_of_its_tokens_stood(strategy):
    model, x = ROTARY["DINOv3"]().eval(), images()
    _, infos = elip_models.encode_image(model, x, text(), strategy=strategy, return_info=True)
    places, merged = torch.arange(36).expand(2, -1), 0
    for info in infos:
        source = info.reduction.source_map()
        assert torch.equal(source[:, :5, :5], torch.eye(5, dtype=torch.bool).expand(2, -1, -1))
        assert not source[:, 5:, :5].any() and not source[:, :5, 5:].any()
        source = source[:, 5:, 5:]
        members = torch.where(source, places[:, None], -1)
        assert (members == info.positions[..., None]).any(2).all()
        alone = source.sum(2) == 1
        assert torch.equal(info.positions[alone], members.amax(2)[alone])
        merged += int((~alone).sum())
        places = info.positions
    assert merged > 0


AT_ONE_POSITION = [
    ("kept", name) for name in ("EVA-02 tiny", "DINOv3", "rope mixed", *PLACED_BY_BIAS)
]
AT_ONE_POSITION += [("mean", name) for name in ("EVA-02 tiny", "DINOv3", "rope mixed")]


@torch.no_grad()
@pytest.mark.parametrize(("position", "name"), AT_ONE_POSITION)
def test_equal_tokens_at_one_position_merge_to_the_dense_result(position, name):
    """Attention by size counts a merged pair twice, so every later block is as without a merge."""
    model = (ROTARY | PLACED_BY_BIAS)[name]().eval().double()
    tower, p = as_tower(model), as_tower(model).num_prefix_tokens
    places = torch.stack([torch.randperm(36)[:18] for _ in range(2)]).repeat_interleave(2, 1)
    tokens = tower.embed(images().double())
    patches = tokens[:, p:].gather(1, places[..., None].expand(-1, -1, WIDTH))
    dense = tokens = torch.cat([tokens[:, :p], patches], dim=1)
    placed = tower.with_positions(places)
    forward = ForwardState(placed, ToMe((18, 0, 0, 0, 0, 0), position=position))
    for i in range(tower.depth):
        dense = placed.block(i, dense)
        tokens, info = forward.run_block(i, tokens)
        forward.infos[i] = info
    first = forward.infos[0]
    assert tokens.shape[1] == p + 18
    if position == "kept":
        assert torch.equal(first.positions, places[:, ::2])
    restored = elip_kernels.unmerge(tokens, first.reduction)
    close = 1e-10 if position == "kept" else 1e-5  # the tables of the models are fp32
    torch.testing.assert_close(restored, dense, atol=close, rtol=close)


@torch.no_grad()
@pytest.mark.parametrize("name", PLACED_BY_BIAS)
def test_scores_are_those_of_the_attention_with_its_bias(name):
    model, x = PLACED_BY_BIAS[name]().eval(), images()
    tower = as_tower(model)
    whole, last = (tower.attention_map(i, tower.embed(x)) for i in (0, 5))
    received = elip_models.ELIP("6(50%)", scorer="received")
    scores = received.score(tower, received.stages(tower.size)[0], tower.embed(x), text())
    torch.testing.assert_close(scores, last.mean((1, 2)), atol=1e-6, rtol=1e-5)
    if not tower.has_cls:
        return
    strategy, row = EViT(0.5, layers=(0,)), whole[:, :, 0].mean(1)
    _, (info,) = elip_models.encode_image(model, x, strategy=strategy, return_info=True)
    torch.testing.assert_close(info.attention, row, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", PLACED_BY_BIAS)
def test_a_bias_follows_the_positions(name):
    model, x = PLACED_BY_BIAS[name]().eval(), images()
    tower, close = as_tower(model), {"atol": 2e-5, "rtol": 2e-5}
    places = torch.stack([torch.randperm(36)[:20].sort().values for _ in range(2)])
    places[:, -1] = -1  # a merged token
    p, tokens = tower.num_prefix_tokens, tower.embed(x)
    for i in range(tower.depth):
        whole = tower.block(i, tokens)
        everywhere = tower.with_positions(torch.arange(36).expand(2, -1))
        torch.testing.assert_close(everywhere.block(i, tokens), whole, **close)
        torch.testing.assert_close(tower.mlp(i, tower.attend(i, tokens)), whole, **close)
        few, at = tokens[:, : p + 20], tower.with_positions(places)
        full = tower.position_bias(i)
        if full is not None:
            bias = at.position_bias(i)
            assert not bias[:, :, -1].any() and not bias[..., -1].any()
            for b, n, m in ((0, 3, 7), (1, 0, 18)):
                there = full[0, :, p + places[b, n], p + places[b, m]]
                assert torch.equal(bias[b, :, p + n, p + m], there)
        if tower.has_cls:
            row = at.attention_map(i, few)[:, :, 0].mean(1)
            got = at.cls_attention(i, few, few[:, 0])
            torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
            cls = at.cls_block(i, few, few[:, 0])
            torch.testing.assert_close(cls, at.block(i, few)[:, 0], **close)
        tokens = whole
