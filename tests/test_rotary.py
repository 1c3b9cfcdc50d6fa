"""Rotary towers: every kept token keeps its own rotation, the merged one has none."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.eva import Eva

import elip_kernels
import elip_models
from elip_models.towers import as_tower
from tests.test_towers import enlarged
from tests.towers import (
    SCHEDULE,
    WIDTH,
    assert_equal_gradients,
    gradients,
    gradients_of_a_step,
    images,
    text,
)

EVA02 = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": 6,
    "num_heads": 2,
    "num_classes": 5,
    "global_pool": "token",
    "use_rot_pos_emb": True,
    "ref_feat_shape": (4, 4),
}


def eva(**options):
    return enlarged(Eva(**(EVA02 | options)))


TOWERS = {
    "EVA-02 tiny": lambda: eva(mlp_ratio=8 / 3, swiglu_mlp=True),
    "EVA-02 base": lambda: eva(
        mlp_ratio=8 / 3, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, scale_attn_inner=True
    ),
    "EVA without rotation": lambda: eva(use_rot_pos_emb=False, init_values=0.3),
    "q/k norm, half": lambda: eva(qk_norm=True, rope_rotate_half=True, init_values=0.3),
    "DINOv3": lambda: eva(
        rope_type="dinov3", num_reg_tokens=4, rope_rotate_half=True, use_abs_pos_emb=False
    ),
    "rope": lambda: eva(attn_type="rope", no_embed_class=True, use_abs_pos_emb=False),
    "rope mixed": lambda: eva(attn_type="rope", rope_type="mixed", no_embed_class=True),
    "rope split q, k, v": lambda: eva(attn_type="rope", qkv_fused=False),
}


@pytest.fixture(params=TOWERS.values(), ids=TOWERS)
def model(request):
    return request.param().eval()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_empty_schedule_is_the_untouched_model(model, mode):
    getattr(model, mode)()
    x = images()
    expected, keys = model(x), list(model.state_dict())
    elip_models.reduce_(model, schedule="6(100%)")
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


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


def test_untouched_tokens_at_their_places_are_those_of_the_full_grid(model):
    tower, x = as_tower(model), images()
    if not tower.is_rotary:
        pytest.skip("it has no rotation")
    tokens = tower.embed(x)
    placed = tower.at(torch.arange(36).expand(2, -1))
    for i in range(tower.depth):
        assert torch.equal(placed.block(i, tokens), tower.block(i, tokens))


def test_kept_tokens_are_rotated_as_timms_own_patch_dropout_does():
    model, x = TOWERS["rope"]().eval(), images()
    tower, p = as_tower(model), model.num_prefix_tokens
    kept = torch.stack([torch.randperm(36)[:12].sort().values for _ in range(2)])
    tokens, rope = model._pos_embed(model.patch_embed(x))
    rope = timm.layers.apply_keep_indices_nlc(tokens, rope, kept).unsqueeze(1)
    patches = tokens[:, p:].gather(1, kept[..., None].expand(-1, -1, WIDTH))
    tokens = torch.cat([tokens[:, :p], patches], dim=1)
    expected = model.blocks[0](tokens, rope=rope)
    assert torch.equal(tower.at(kept).block(0, tokens), expected)


def test_places_follow_tokens_through_the_stages():
    model, x = TOWERS["DINOv3"]().eval(), images()
    _, infos = elip_models.encode_image(model, x, text(), schedule=SCHEDULE, return_info=True)
    places = torch.arange(36).expand(2, -1)
    for info in infos:
        kept = places.gather(1, info.reduction.kept - 5)
        places = torch.cat([kept, torch.full((2, 1), 36)], dim=1)  # the merged one: no place
        assert torch.equal(info.positions, places)


@pytest.mark.parametrize("scorer", ["official", "exact", "cls", "last"])
def test_patched_model_equals_encode_image(model, scorer):
    x, t = images(), text()
    dense = model(x)
    tokens, infos = elip_models.encode_image(
        model, x, t, schedule=SCHEDULE, scorer=scorer, return_info=True
    )
    tower = as_tower(model)
    assert tokens.shape == (2, 10 + 1 + tower.num_prefix_tokens, WIDTH)
    assert [i.stage.keep for i in infos] == [28, 18, 10]
    elip_models.reduce_(model, schedule=SCHEDULE, scorer=scorer)
    with elip_models.guidance(model, t):
        assert torch.equal(model.forward_features(x), tokens)
        reduced = model(x)
    assert not torch.allclose(reduced, dense)
    reduced.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    elip_models.unreduce_(model)
    assert torch.equal(model(x), dense)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_rotation_decides_what_is_computed():
    model, x, t = TOWERS["rope"]().eval(), images(), text()
    tokens = elip_models.encode_image(model, x, t, schedule="3(100%) 3(50%)")
    tower = as_tower(model)
    entered = tower.embed(x)
    for block in model.blocks[:3]:
        entered = block(entered, rope=model.rope.get_embed())
    _, (info,) = elip_models.encode_image(model, x, t, schedule="3(100%) 3(50%)", return_info=True)
    out = elip_kernels.reduce(entered, info.attention, 18)
    wrong = right = out
    for block in model.blocks[3:]:
        right = block(right, rope=tower.turned_to(model.rope.get_embed(), info.positions))
        wrong = block(wrong, rope=model.rope.get_embed()[:19])
    assert torch.equal(model.norm(right), tokens)
    assert not torch.allclose(model.norm(wrong), tokens, atol=1e-2)


@pytest.mark.parametrize("name", ["EVA-02 tiny", "rope mixed"])
@pytest.mark.parametrize("strategy", ["evit", "random", "patch_dropout", "trips"])
def test_strategies_tell_the_later_blocks_where_their_tokens_stand(name, strategy):
    model, x, t = TOWERS[name]().train(), images(), text()
    options = {"schedule": SCHEDULE} if strategy in ("random", "trips") else {}
    torch.manual_seed(0)
    tokens = elip_models.encode_image(model, x, t, strategy=strategy, **options)
    elip_models.reduce_(model, strategy=strategy, **options)
    for _ in range(2):
        torch.manual_seed(0)
        with elip_models.guidance(model, t):
            assert torch.equal(model.forward_features(x), tokens)


@pytest.mark.parametrize("name", ["EVA-02 tiny", "rope mixed"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    model, x, t = TOWERS[name]().eval(), images(), text()
    elip_models.reduce_(model, schedule="3(100%) 3(50%)", scorer="exact")
    with elip_models.guidance(model, t):
        expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with elip_models.guidance(compiled, t):
        got = compiled(x)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(images())
    got.sum().backward()


@pytest.mark.parametrize("strategy", ["elip", "evit"])
def test_checkpointing_replays_the_places(model, strategy):
    x, t = images(), text()
    options = {"schedule": SCHEDULE, "scorer": "exact"} if strategy == "elip" else {}
    elip_models.reduce_(model.train(), strategy=strategy, **options)
    expected = gradients_of_a_step(model, x, t)
    model.set_grad_checkpointing(True)
    got = gradients_of_a_step(model, x, t)
    assert_equal_gradients(got, expected, atol=1e-5, rtol=1e-4)
    elip_models.unreduce_(model)
    model.zero_grad()
    tokens = elip_models.encode_image(model, x, t, strategy=strategy, **options)
    model.forward_head(tokens).square().sum().backward()
    assert_equal_gradients(gradients(model), expected, atol=1e-5, rtol=1e-4)


def test_blocks_compiled_one_by_one_replay_the_places_too():
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
    model, pairs = TOWERS["EVA-02 tiny"]().train(), [(images(), text()) for _ in range(2)]
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


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_can_be_undone(how):
    model, x, t = TOWERS["rope mixed"]().eval(), images(), text()
    dense = model(x)
    elip_models.reduce_(model, schedule=SCHEDULE)
    with elip_models.guidance(model, t):
        expected = model(x)
    other = how(model)
    with elip_models.guidance(other, t):
        assert torch.equal(other(x), expected)
    assert torch.equal(elip_models.unreduce_(other)(x), dense)


REFUSED = {
    "pools by 'avg'": {"global_pool": "avg"},
    "pools by 'map'": {"global_pool": "map"},
    "no CLS token": {"class_token": False, "global_pool": ""},
    "patch dropout": {"patch_drop_rate": 0.5},
    "dynamic_img_size": {"dynamic_img_size": True},
    "post-norm": {"use_post_norm": True},
    "gates its attention": {"attn_type": "rope", "rope_type": "cat", "gated": True},
    "grouped-query": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
    "draws its rotations anew": {"rope_type": "dinov3", "rope_shift_coords": 0.1},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_models_are_refused_with_the_reason(reason):
    options = dict(REFUSED[reason])
    gated = options.pop("gated", False)
    model = eva(**options)
    if gated:
        model.blocks[2].attn.gate = torch.nn.Linear(WIDTH, WIDTH)
    with pytest.raises(TypeError, match=reason):
        elip_models.reduce_(model, schedule="6(100%)")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_tome_is_refused_with_the_reason():
    with pytest.raises(TypeError, match="stands at two positions"):
        elip_models.reduce_(TOWERS["EVA-02 tiny"](), strategy="tome")


def test_flops_count_the_gated_mlp():
    size = as_tower(TOWERS["EVA-02 tiny"]()).size
    hidden = int(WIDTH * 8 / 3)
    assert size.hidden == round(1.5 * hidden)  # three products of D x F, where an MLP has two
    assert size.row_flops(37) == 2 * 37 * WIDTH * (WIDTH + 1)
