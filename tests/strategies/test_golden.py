"""encode_image and reduce against tensors made by the official implementations."""

import json
from functools import partial

import open_clip
import pytest
import torch

import elip_kernels
import elip_models
from elip_models.strategies.schedule import Schedule
from tests.helpers.golden_weights import GOLDEN
from tests.helpers.official import (
    SCHEDULE,
    check_gradients,
    check_stages,
    timm_name,
    tower,
)


@pytest.mark.parametrize("scorer", ["official", "exact"])
@pytest.mark.parametrize("name", ["elip_albef", "elip_blip"])
def test_timm_tower_reproduces_official_albef_and_blip(golden, name, scorer):
    case = golden(name)
    model = tower(case)
    model.load_state_dict(case.under("sd/"))
    image = case["image"].requires_grad_()
    tokens, infos = elip_models.encode_image(
        model, image, case["text_cls"], schedule=SCHEDULE, scorer=scorer, return_info=True
    )
    check_stages(case, infos)
    torch.testing.assert_close(tokens, case["out"], atol=1e-5, rtol=0)
    (tokens * case["upstream/out"]).sum().backward()
    check_gradients(
        {n: p.grad for n, p in model.named_parameters()} | {"image": image.grad},
        case.under("grad/"),
    )


def in_timm(case):
    """Return an image tower with the official weights in timm, its projection, and its names."""
    model = tower(case, pre_norm=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
    weights = case.under("sd/")
    proj = weights.pop("proj").requires_grad_()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    model.load_state_dict({timm_name(n): w.view(shapes[timm_name(n)]) for n, w in weights.items()})
    return model, proj, {n: timm_name(n) for n in weights}


def in_open_clip(case):
    """Return the same tower in open_clip."""
    config = case.meta["config"]
    model = open_clip.transformer.VisionTransformer(
        image_size=config["image"],
        patch_size=config["patch"],
        width=config["embed_dim"],
        layers=config["depth"],
        heads=config["heads"],
        mlp_ratio=config["mlp_ratio"],
        output_dim=case["out_pooled"].shape[1],
    )
    model.load_state_dict(case.under("sd/"))
    return model, model.proj, {n: n for n in case.under("sd/")}


@pytest.mark.parametrize("scorer", ["official", "exact"])
@pytest.mark.parametrize("made", [in_timm, in_open_clip])
def test_clip_tower_reproduces_official_openclip(golden, made, scorer):
    case = golden("elip_openclip")
    model, proj, names = made(case)
    image, schedule = case["image"].requires_grad_(), Schedule.parse(SCHEDULE, count_cls=True)
    text_cls, plan = case["text_cls"] @ proj.T, {"schedule": schedule, "scorer": scorer}
    tokens, infos = elip_models.encode_image(model, image, text_cls, return_info=True, **plan)
    check_stages(case, infos)
    pooled = tokens[:, 0] @ proj
    torch.testing.assert_close(tokens[:, 1:], case["out_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, case["out_pooled"], atol=1e-5, rtol=0)
    loss = (pooled * case["upstream/out_pooled"]).sum()
    (loss + (tokens[:, 1:] * case["upstream/out_tokens"]).sum()).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    theirs = {n: grads[name] for n, name in names.items()}
    check_gradients(theirs | {"image": image.grad, "proj": proj.grad}, case.under("grad/"))


REDUCE_CASES = json.loads((GOLDEN / "elip_reduce_only.json").read_text())["cases"]


@pytest.mark.parametrize(("key", "keep"), [(c["key"], c["keep"]) for c in REDUCE_CASES])
def test_reduce_reproduces_the_official_statements(golden, key, keep):
    case = golden("elip_reduce_only").under(key)
    tokens = case["tokens"].requires_grad_()
    if key == "14_keep_more_than_n/":
        with pytest.raises(ValueError, match="keep"):
            elip_kernels.reduce(tokens, case["attn"], keep)
        keep = tokens.shape[1] - 1
    out, info = elip_kernels.reduce(tokens, case["attn"], keep, return_info=True)
    expected = case["out"]
    if keep == tokens.shape[1] - 1:  # the official code appends a zero token here
        assert out is tokens
        assert torch.equal(out, expected[:, :-1])
        return
    assert torch.equal(info.kept, case["keep_idx"][:, 1:].long())
    assert out.dtype == tokens.dtype
    ulp = torch.finfo(out.dtype).eps if out.dtype == torch.bfloat16 else 2e-7
    bound = ulp * expected.abs().clamp_min(1.0)
    assert ((out - expected).abs() <= bound).all()
    (out * case["upstream"]).sum().backward()
    grad = case["grad_tokens"]
    assert ((tokens.grad - grad).abs() <= ulp * grad.abs().clamp_min(1.0)).all()
