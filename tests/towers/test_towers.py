"""The parts of a tower's block compute what the block computes, in three libraries."""

import pytest
import timm
import torch
import transformers
from torch import nn

import elip_kernels
import elip_models
from elip_models.towers import Query, as_tower
from tests.helpers.models import HF, TOWERS, open_clip_vit
from tests.helpers.official import OPENCLIP_NAMES
from tests.helpers.towers import SCHEDULE, WIDTH, images, text


@pytest.fixture(params=TOWERS.values(), ids=TOWERS)
def model(request):
    return request.param().eval()


@torch.no_grad()
def test_parts_add_up_to_the_block(model):
    tower = as_tower(model)
    tokens = tower.embed(images())
    assert tokens.shape == (2, tower.num_tokens, WIDTH)
    for i in range(tower.depth):
        whole = tower.block(i, tokens)
        assert tower.is_plain(i)
        close = {"atol": 2e-5, "rtol": 2e-5}
        torch.testing.assert_close(tower.mlp(i, tower.attend(i, tokens)), whole, **close)
        alone = tower.cls_block(i, tokens, tokens[:, 0])
        torch.testing.assert_close(alone, whole[:, 0], **close)
        row = tower.attention_map(i, tokens)[:, :, 0].mean(1)
        query = Query(tokens[:, 0])
        got = tower.cls_attention(i, tokens, query.cls)
        torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
        out, info, scored = tower.score_reduce(i, tokens, tokens, query, keep=10, merge="one")
        torch.testing.assert_close(scored, got, atol=1e-6, rtol=0)
        expected, kept = elip_kernels.reduce(
            tokens, scored, 10, num_prefix_tokens=tower.num_prefix_tokens, return_info=True
        )
        assert torch.equal(info.kept, kept.kept)
        torch.testing.assert_close(out, expected)
        tokens = whole


def renamed(state, names):
    """Return a state dict under another library's names."""
    out = {}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = value
    return out


HF_NAMES = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def same_weights():
    """Return one CLIP image tower in three libraries."""
    theirs = open_clip_vit()
    state = {n: w for n, w in theirs.state_dict().items() if n != "proj"}
    in_timm = timm.models.VisionTransformer(
        img_size=48,
        patch_size=8,
        embed_dim=WIDTH,
        depth=6,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        pre_norm=True,
        norm_layer=nn.LayerNorm,
    )
    shapes = {n: w.shape for n, w in in_timm.state_dict().items()}
    in_timm.load_state_dict(
        {n: w.view(shapes[n]) for n, w in renamed(state, OPENCLIP_NAMES).items()}
    )
    config = transformers.CLIPVisionConfig(**HF, hidden_act="gelu", layer_norm_eps=1e-5)
    in_hf = transformers.CLIPVisionModel(config)
    split = {}
    for name, value in renamed(state, HF_NAMES).items():
        if ".attn.in_proj_" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                split[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = rows
        else:
            split[name] = value
    in_hf.load_state_dict(split, strict=False)
    assert set(split) == set(in_hf.state_dict())
    return theirs.eval(), in_timm.eval(), in_hf.eval()


@pytest.mark.parametrize("scorer", ["official", "exact", "cls", "last"])
def test_three_libraries_keep_the_same_tokens(scorer):
    x, t, runs = images(4), text(4), []
    for model in same_weights():
        runs.append(
            elip_models.encode_image(
                model, x, t, schedule=SCHEDULE, scorer=scorer, return_info=True
            )
        )
    (expected, stages), *others = runs
    for tokens, infos in others:
        for info, stage in zip(infos, stages, strict=True):
            assert torch.equal(info.reduction.kept, stage.reduction.kept)
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
