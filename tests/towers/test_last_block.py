"""If only CLS is read in inference, the last block runs for that token alone, exactly."""

import pytest
import torch
import torch.nn.functional as F

from elip_models.engine.encode import encode_image, run_tower
from elip_models.strategies.elip import ELIP
from elip_models.towers import as_tower
from tests.helpers.own_warnings import SLOW_SCORER
from tests.helpers.towers import SCHEDULE, clip_vit, images, plain_vit, text
from tests.pretraining.models.test_clip import tiny

DENSE = "6(100%)"


def both(model, settings, x, t=None):
    """Return CLS features (B, D) from a last block of all tokens, and of CLS alone."""
    tower = as_tower(model)
    tokens, _ = run_tower(tower, x, t, settings)
    alone, infos = run_tower(tower, x, t, settings, cls_only=True)
    assert alone.shape == (x.shape[0], 1, model.embed_dim)
    return tokens[:, 0], alone[:, 0], infos


@pytest.fixture
def calls():
    """Record the tokens of each attention product; a hook would change the path."""
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        original = F.scaled_dot_product_attention

        def attention(q, *args, **kwargs):
            counted.append(q.shape[2])
            return original(q, *args, **kwargs)

        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield counted


TOWERS = {
    "plain": plain_vit,
    "clip": clip_vit,
    "scale norm": lambda: plain_vit(scale_attn_norm=True, scale_mlp_norm=True),
    "no bias": lambda: plain_vit(qkv_bias=False, proj_bias=False),
    "dropout and drop path": lambda: clip_vit(
        proj_drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("schedule", [DENSE, SCHEDULE, "3(100%) 3(50%)"])
@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)
def test_the_last_block_of_cls_alone_is_exact(make, schedule):
    """The last stage of SCHEDULE begins at the last block, which reduces first."""
    model, x = make().eval(), images(3)
    all_tokens, alone, infos = both(model, ELIP(schedule), x, text(3))
    torch.testing.assert_close(alone, all_tokens, atol=1e-5, rtol=1e-5)
    assert len(infos) == len(ELIP(schedule).schedule.stages(36))


def all_tokens(model, x, features=None):
    """The image tower of our CLIP, reduced by its own strategy."""
    text_cls = None if features is None else model.guidance(features)
    return encode_image(model.visual, x, text_cls, strategy=model.reduction)


@SLOW_SCORER
@torch.no_grad()
@pytest.mark.parametrize("guided", [True, False])
def test_clip_runs_it_in_inference(calls, guided):
    model, x = tiny("elip_clip_tiny").eval(), torch.randn(2, 3, 32, 32)
    depth = model.tower.depth
    features = F.normalize(torch.randn(2, 12), dim=-1) if guided else None
    if not guided:
        model.reduction = model.dense
    got = model.encode_image(x, features)
    tokens = all_tokens(model, x, features) if guided else model.visual.forward_features(x)
    whole = F.normalize(model.image_projection(tokens[:, 0]), dim=-1)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    calls.clear()
    model.reduction = model.dense
    model.encode_image(x)
    assert len(calls) == depth - 1
    all_tokens(model, x)
    assert len(calls) == depth - 1 + depth


def test_it_does_not_run_with_gradient_or_in_training(calls):
    model, x = tiny("clip_tiny").eval(), torch.randn(2, 3, 32, 32)
    depth = model.tower.depth
    model.encode_image(x)
    assert len(calls) == depth
    model.train()
    with torch.no_grad():
        model.encode_image(x)
    assert len(calls) == 2 * depth
    model.eval().set_grad_checkpointing()
    with torch.no_grad():
        model.encode_image(x)
    assert len(calls) == 3 * depth - 1


@torch.no_grad()
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("path", ["", "attn", "attn.qkv", "mlp.act", "norm2"])
def test_hooks_on_the_last_block_see_every_token(calls, register, path):
    model, x = tiny("clip_tiny").eval(), torch.randn(2, 3, 32, 32)
    expected, seen = model.encode_image(x), []
    module = model.visual.blocks[-1].get_submodule(path)
    handle = getattr(module, register)(lambda module, args, *_: seen.append(args[0].shape[1]))
    calls.clear()
    torch.testing.assert_close(model.encode_image(x), expected, atol=1e-5, rtol=1e-5)
    assert seen == [model.tower.num_patches + 1]
    assert len(calls) == model.tower.depth
    handle.remove()
    model.encode_image(x)
    assert len(calls) == 2 * model.tower.depth - 1
