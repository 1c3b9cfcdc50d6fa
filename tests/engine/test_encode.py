"""encode_image on timm towers: scorers, guidance, gradients and cost."""

import pytest
import torch

import elip_models
from elip_kernels.ops.fuse_text import fuse
from tests.helpers.towers import SCHEDULE, WIDTH, clip_vit, images, plain_vit, text


@pytest.mark.parametrize("scorer", ["official", "exact", "cls", "last", 1, "2-layer stages"])
def test_scorers_by_their_definition(scorer):
    """The row of the first stage equals that of the model's own blocks and attention maps."""
    scorer = 2 if scorer == "2-layer stages" else scorer
    schedule = "2(100%) 4(50%)"
    model, x, t = clip_vit(), images(), text()
    y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    y = model.blocks[1](model.blocks[0](y))
    tokens_entering = y.clone()
    y[:, 0] = 0.8 * y[:, 0] + 0.2 * t

    def row(i, y):
        block = model.blocks[i]
        qkv = block.attn.qkv(block.norm1(y)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return (qkv[0] @ qkv[1].mT * block.attn.scale).softmax(-1)[:, :, 0].mean(1)

    if scorer == "cls":
        for i in (2, 3, 4):
            y = torch.cat([model.blocks[i](y)[:, :1], tokens_entering[:, 1:]], dim=1)
        expected = row(5, y)
    else:
        first, last = {"last": (5, 5), 1: (2, 2), 2: (2, 3)}.get(scorer, (2, 5))
        for i in range(first, last):
            y = model.blocks[i](y)
        expected = row(last, y)
    _, infos = elip_models.encode_image(
        model, x, t, schedule=schedule, scorer=scorer, return_info=True
    )
    torch.testing.assert_close(infos[0].attention, expected, atol=1e-6, rtol=0)
    assert not infos[0].attention.requires_grad


def test_fusion_one_is_vision_only_and_needs_no_text():
    model, x = clip_vit(), images()
    plan = {"schedule": SCHEDULE, "fusion": 1.0}
    guided = elip_models.encode_image(model, x, text(), **plan)
    assert torch.equal(elip_models.encode_image(model, x, **plan), guided)
    vision = elip_models.encode_image(model, x, schedule=SCHEDULE, without_text="vision")
    assert torch.equal(vision, guided)


def test_guidance_norm_match_rescales_the_text_to_the_cls_norm():
    cls, t = torch.randn(2, WIDTH), 1e-3 * text()
    scaled = t * cls.norm(dim=1, keepdim=True) / t.norm(dim=1, keepdim=True)
    torch.testing.assert_close(fuse(cls, t, 0.8, True), 0.8 * cls + 0.2 * scaled)
    assert fuse(cls, torch.zeros_like(t), 0.8, True).isfinite().all()


def test_text_gets_no_gradient_and_images_do():
    x, t = images().requires_grad_(), text().requires_grad_()
    elip_models.encode_image(plain_vit(), x, t, schedule=SCHEDULE).square().sum().backward()
    assert t.grad is None
    assert x.grad.abs().sum() > 0
