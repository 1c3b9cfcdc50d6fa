"""Rotary towers: every kept token keeps its own rotation, the merged one has none."""

import pytest
import timm
import torch

import elip_kernels
import elip_models
from elip_models.towers import as_tower
from tests.helpers.models import ROTARY, eva
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


@pytest.fixture(params=ROTARY.values(), ids=ROTARY)
def model(request):
    return request.param().eval()


@torch.no_grad()
def test_parts_add_up_to_the_block(model):
    tower, close = as_tower(model), {"atol": 2e-5, "rtol": 2e-5}
    places = torch.stack([torch.randperm(36)[:20].sort().values for _ in range(2)])
    places[:, -1] = 36  # a merged token
    for at, n in ((None, tower.num_tokens), (places, tower.num_prefix_tokens + 20)):
        x, bound = tower.embed(images())[:, :n], tower.at(at)
        for i in range(tower.depth):
            whole = bound.block(i, x)
            assert tower.is_plain(i)
            torch.testing.assert_close(bound.mlp(i, bound.attend(i, x)), whole, **close)
            torch.testing.assert_close(bound.cls_block(i, x, x[:, 0]), whole[:, 0], **close)
            row = bound.attention_map(i, x)[:, :, 0].mean(1)
            got = bound.cls_attention(i, x, x[:, 0])
            torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
            x = whole


def test_all_tokens_at_their_positions_equal_the_full_grid(model):
    tower, x = as_tower(model), images()
    if not tower.is_rotary:
        pytest.skip("it has no rotation")
    tokens = tower.embed(x)
    placed = tower.at(torch.arange(36).expand(2, -1))
    for i in range(tower.depth):
        assert torch.equal(placed.block(i, tokens), tower.block(i, tokens))


def test_kept_tokens_are_rotated_as_timms_own_patch_dropout_does():
    model, x = ROTARY["rope"]().eval(), images()
    tower, p = as_tower(model), model.num_prefix_tokens
    kept = torch.stack([torch.randperm(36)[:12].sort().values for _ in range(2)])
    tokens, rope = model._pos_embed(model.patch_embed(x))
    rope = timm.layers.apply_keep_indices_nlc(tokens, rope, kept).unsqueeze(1)
    patches = tokens[:, p:].gather(1, kept[..., None].expand(-1, -1, WIDTH))
    tokens = torch.cat([tokens[:, :p], patches], dim=1)
    expected = model.blocks[0](tokens, rope=rope)
    assert torch.equal(tower.at(kept).block(0, tokens), expected)


def test_positions_follow_tokens_through_the_stages():
    model, x = ROTARY["DINOv3"]().eval(), images()
    _, infos = elip_models.encode_image(model, x, text(), schedule=SCHEDULE, return_info=True)
    places = torch.arange(36).expand(2, -1)
    for info in infos:
        kept = places.gather(1, info.reduction.kept - 5)
        places = torch.cat([kept, torch.full((2, 1), 36)], dim=1)  # the merged one: no place
        assert torch.equal(info.positions, places)


def test_the_rotation_decides_what_is_computed():
    model, x, t = ROTARY["rope"]().eval(), images(), text()
    tokens = elip_models.encode_image(model, x, t, schedule="3(100%) 3(50%)")
    tower = as_tower(model)
    entered = tower.embed(x)
    for block in model.blocks[:3]:
        entered = block(entered, rope=model.rope.get_embed())
    _, (info,) = elip_models.encode_image(model, x, t, schedule="3(100%) 3(50%)", return_info=True)
    out = elip_kernels.reduce(entered, info.attention, 18)
    wrong = right = out
    for block in model.blocks[3:]:
        right = block(right, rope=tower.rotations_at(model.rope.get_embed(), info.positions))
        wrong = block(wrong, rope=model.rope.get_embed()[:19])
    assert torch.equal(model.norm(right), tokens)
    assert not torch.allclose(model.norm(wrong), tokens, atol=1e-2)


@pytest.mark.parametrize("name", ["EVA-02 tiny", "rope mixed"])
@pytest.mark.parametrize("strategy", ["evit", "random", "patch_dropout", "trips"])
def test_strategies_pass_positions_to_later_blocks(name, strategy):
    model, x, t = ROTARY[name]().train(), images(), text()
    options = {"schedule": SCHEDULE} if strategy in ("random", "trips") else {}
    torch.manual_seed(0)
    tokens = elip_models.encode_image(model, x, t, strategy=strategy, **options)
    elip_models.reduce_(model, strategy=strategy, **options)
    for _ in range(2):
        torch.manual_seed(0)
        with elip_models.guidance(model, t):
            assert torch.equal(model.forward_features(x), tokens)


EXACT = {"schedule": SCHEDULE, "scorer": "exact"}
PLACED = {"elip": EXACT, "evit": {"strategy": "evit"}, "nearest": EXACT | {"merge": "nearest"}}


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


@pytest.mark.exhaustive
def test_blocks_compiled_one_by_one_replay_the_positions():
    torch._dynamo.reset()
    model, x, t = eva(depth=4).train(), images(), text()
    elip_models.reduce_(model, schedule="1(100%) 3(50%)", scorer="exact")
    expected = gradients_of_a_step(model, x, t)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        got = gradients_of_a_step(model, x, t)
        assert_equal_gradients(got, expected, atol=1e-4, rtol=1e-4)


def test_two_forwards_may_wait_for_one_backward():
    model, pairs = ROTARY["EVA-02 tiny"]().train(), [(images(), text()) for _ in range(2)]
    elip_models.reduce_(model, schedule=SCHEDULE)
    found = []
    for checkpoint in (False, True):
        model.set_grad_checkpointing(checkpoint)
        model.zero_grad()
        losses = []
        for x, t in pairs:
            with elip_models.guidance(model, t):
                losses.append(model(x).square().sum())
        sum(losses).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_equal_gradients(*found, atol=1e-5, rtol=1e-4)


def test_flops_count_the_gated_mlp():
    size = as_tower(ROTARY["EVA-02 tiny"]()).size
    hidden = int(WIDTH * 8 / 3)
    assert size.hidden == round(1.5 * hidden)  # three products of D x F, where an MLP has two
    assert size.row_flops(37) == 2 * 37 * WIDTH * (WIDTH + 1)
