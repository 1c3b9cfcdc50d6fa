"""Every library's towers by the same claims: identity, parts that add up, equal adapters."""

import copy
import pickle

import open_clip
import pytest
import timm
import torch
import transformers
from torch import nn

import elip_kernels
import elip_models
from elip_models.reduction.schedule import Schedule
from elip_models.towers import as_tower
from tests.test_golden import OPENCLIP_NAMES, check_gradients, check_stages
from tests.test_golden import SCHEDULE as PAPER
from tests.towers import SCHEDULE, WIDTH, images, plain_vit, text

SIZES = {"image_size": 48, "patch_size": 8}
HF = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
} | SIZES


def enlarged(model):
    """Blocks that matter, unlike those of a fresh model."""
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.2)
    return model


def open_clip_vit(**options):
    defaults = {"width": WIDTH, "layers": 6, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16}
    tower = open_clip.transformer.VisionTransformer(**(SIZES | defaults | options))
    for block in tower.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_bias, std=0.2)
    return enlarged(tower)


def distilled_vit():
    return enlarged(
        timm.models.deit.VisionTransformerDistilled(
            img_size=48, patch_size=8, embed_dim=WIDTH, depth=6, num_heads=2, num_classes=5
        )
    )


TOWERS = {
    "timm": plain_vit,
    "timm q/k norm": lambda: plain_vit(qk_norm=True),
    "timm registers": lambda: plain_vit(reg_tokens=3),
    "timm distilled": distilled_vit,
    "open_clip": open_clip_vit,
    "open_clip LayerScale": lambda: open_clip_vit(ls_init_value=0.3, act_layer=nn.SiLU),
    "open_clip own attention": lambda: open_clip_vit(
        qk_norm=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    ),
    "HF CLIP": lambda: enlarged(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**HF, projection_dim=16)
        )
    ),
    "HF ViT": lambda: enlarged(
        transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5))
    ),
    "HF DeiT": lambda: enlarged(
        transformers.DeiTForImageClassificationWithTeacher(
            transformers.DeiTConfig(**HF, num_labels=5)
        )
    ),
    "HF BLIP": lambda: enlarged(transformers.BlipVisionModel(transformers.BlipVisionConfig(**HF))),
}


@pytest.fixture(params=TOWERS.values(), ids=TOWERS)
def model(request):
    return request.param().eval()


def output(model, x):
    """The one tensor that the model is called for."""
    out = model(x)
    if isinstance(out, torch.Tensor):
        return out
    return next(out[n] for n in ("image_embeds", "logits", "pooler_output") if n in out)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_empty_schedule_is_the_untouched_model(model, mode):
    getattr(model, mode)()
    x = images()
    torch.manual_seed(1)
    expected, keys = output(model, x), list(model.state_dict())
    elip_models.reduce_(model, schedule="6(100%)")
    torch.manual_seed(1)
    assert torch.equal(output(model, x), expected)
    assert list(model.state_dict()) == keys


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
        got = tower.cls_attention(i, tokens, tokens[:, 0])
        torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
        out, info, scored = tower.score_reduce(i, tokens, tokens[:, 0], 10, merge=True)
        torch.testing.assert_close(scored, got, atol=1e-6, rtol=0)
        expected, kept = elip_kernels.reduce(
            tokens, scored, 10, num_prefix_tokens=tower.num_prefix_tokens, return_info=True
        )
        assert torch.equal(info.kept, kept.kept)
        torch.testing.assert_close(out, expected)
        tokens = whole


@pytest.mark.parametrize("scorer", ["official", "exact", "cls", "last"])
def test_patched_model_equals_encode_image(model, scorer):
    x, t = images(), text()
    dense = output(model, x)
    tokens, infos = elip_models.encode_image(
        model, x, t, schedule=SCHEDULE, scorer=scorer, return_info=True
    )
    tower = as_tower(model)
    assert tokens.shape == (2, 10 + 1 + tower.num_prefix_tokens, WIDTH)
    assert [i.stage.keep for i in infos] == [28, 18, 10]
    seen = []
    handle = tower.blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    elip_models.reduce_(model, schedule=SCHEDULE, scorer=scorer)
    with elip_models.guidance(model, t):
        reduced = output(model, x)
    handle.remove()
    assert torch.equal(tower.finish(seen[-1]), tokens)
    assert not torch.allclose(reduced, dense)
    reduced.sum().backward()
    elip_models.unreduce_(model)
    assert torch.equal(output(model, x), dense)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_can_be_undone(model, how):
    x, t = images(), text()
    dense = output(model, x)
    elip_models.reduce_(model, schedule=SCHEDULE)
    with elip_models.guidance(model, t):
        expected = output(model, x)
    other = how(model)
    with elip_models.guidance(other, t):
        assert torch.equal(output(other, x), expected)
    assert torch.equal(output(elip_models.unreduce_(other), x), dense)


@pytest.mark.parametrize("name", ["timm q/k norm", "open_clip", "HF CLIP", "HF DeiT"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    model = TOWERS[name]().eval()
    x, t = images(), text()
    elip_models.reduce_(model, schedule="3(100%) 3(50%)", scorer="exact")
    with elip_models.guidance(model, t):
        expected = output(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with elip_models.guidance(compiled, t):
        got = output(compiled, x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.sum().backward()


def test_checkpointing_replays(model, request):
    if "own attention" in request.node.callspec.id:
        pytest.skip("open_clip 3.3 itself cannot checkpoint its CustomResidualAttentionBlock")
    x, t = images(), text()
    model.train()
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")
    gradients = []
    for checkpoint in (False, True):
        if checkpoint and hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif checkpoint:
            model.set_grad_checkpointing(True)
        model.zero_grad()
        torch.manual_seed(3)
        with elip_models.guidance(model, t):
            out = output(model, x)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def renamed(state, names):
    """The entries of a state dict under another library's names."""
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
    """One CLIP image tower in three libraries."""
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


REFUSED = {
    "pools by attention": lambda: open_clip_vit(attentional_pool=True),
    "pools by 'avg'": lambda: open_clip_vit(pool_type="avg"),
    "patch dropout": lambda: open_clip_vit(patch_dropout=0.5),
    "scaled cosine": lambda: open_clip_vit(scaled_cosine_attn=True),
    "output of each head": lambda: open_clip_vit(scale_heads=True),
    "padded patches": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            **{name: value for name, value in HF.items() if name != "image_size"}
        )
    ),
    "has no layers of": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_models_are_refused_with_the_reason(reason):
    model = REFUSED[reason]()
    with pytest.raises(TypeError, match=reason):
        elip_models.reduce_(model, schedule="6(100%)")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_images_of_another_size_are_refused():
    model = transformers.ViTModel(transformers.ViTConfig(**HF))
    elip_models.reduce_(model, schedule=SCHEDULE)
    with pytest.raises(ValueError, match="expected 37 tokens"):
        model(torch.randn(1, 3, 64, 64), interpolate_pos_encoding=True)


@pytest.mark.parametrize("scorer", ["official", "exact"])
def test_open_clip_tower_reproduces_official_openclip(golden, scorer):
    case = golden("elip_openclip")
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
    image = case["image"].requires_grad_()
    tokens, infos = elip_models.encode_image(
        model,
        image,
        case["text_cls"] @ model.proj.T,
        schedule=Schedule.parse(PAPER, count_cls=True),
        scorer=scorer,
        return_info=True,
    )
    check_stages(case, infos)
    pooled = tokens[:, 0] @ model.proj
    torch.testing.assert_close(tokens[:, 1:], case["out_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, case["out_pooled"], atol=1e-5, rtol=0)
    loss = (pooled * case["upstream/out_pooled"]).sum()
    (loss + (tokens[:, 1:] * case["upstream/out_tokens"]).sum()).backward()
    check_gradients(
        {n: p.grad for n, p in model.named_parameters()} | {"image": image.grad},
        case.under("grad/"),
    )
