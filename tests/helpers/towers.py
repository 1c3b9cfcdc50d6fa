"""Tiny towers that the tests share."""

from functools import partial

import timm
import torch

import elip_kernels
import elip_models
from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors

SCHEDULE = "1(100%) 2(80%) 2(50%) 1(30%)"
WIDTH = 32


def plain_vit(**options):
    """Six layers, 36 patches, width 32."""
    defaults = dict(
        img_size=48, patch_size=8, embed_dim=WIDTH, depth=6, num_heads=2, mlp_ratio=2, num_classes=5
    )
    model = timm.models.VisionTransformer(**(defaults | options))
    for weight in model.parameters():
        if weight.dim() == 2:  # blocks that matter, unlike those of a fresh model
            torch.nn.init.normal_(weight, std=0.2)
    return model


def clip_vit(**options):
    """The CLIP form: pre-norm, no patch bias, QuickGELU, LayerScale, another eps."""
    return plain_vit(
        pre_norm=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
        act_layer="quick_gelu",
        init_values=0.3,
        **options,
    )


def images(batch=2):
    return torch.randn(batch, 3, 48, 48)


def text(batch=2):
    return torch.randn(batch, WIDTH)


def whole_grid(tokens, infos):
    """tokens (B, T, D) after all steps -> (B, N, D), each patch the token that it went into."""
    source = None
    for info in infos:
        source = info.reduction.source_map(source)
    return elip_kernels.unmerge(tokens, source)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], **(tolerance or {"rtol": 0, "atol": 0})
        )


def gradients_of_a_step(model, x, t, wrap=lambda m: m):
    """Gradients of one step; backward runs after the guidance context has ended."""
    model.zero_grad()
    torch.manual_seed(7)
    with elip_models.guidance(model, t):
        out = wrap(model)(x)
    out.square().sum().backward()
    return gradients(model)


def our_names(kind):
    """name in an official checkpoint -> ours."""
    return lambda name: next(iter(rename_tensors({name: torch.empty(3, 3)}, KINDS[kind].names)))
