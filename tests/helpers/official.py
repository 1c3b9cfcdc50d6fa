"""Helpers of tests against official implementations: sizes, names, weights, comparisons."""

import timm
import torch

SCHEDULE = "2(100%) 2(90%) 6(65%) 2(40%)"
OPENCLIP_NAMES = {
    "conv1.weight": "patch_embed.proj.weight",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def timm_name(name):
    """Return the timm name of a parameter of OpenAI's image tower."""
    for theirs, ours in OPENCLIP_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def tower(case, **options):
    """Return a timm tower with the sizes of a golden case."""
    config = case.meta["config"]
    return timm.models.VisionTransformer(
        img_size=config["image"],
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        num_heads=config["heads"],
        depth=config["depth"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=0,
        **options,
    )


def check_stages(case, infos):
    """Check that scores, kept tokens and merge weights of each stage equal the official ones."""
    for s, info in enumerate(infos):
        prefix = torch.zeros_like(info.reduction.kept[:, :1])
        kept = torch.cat([prefix, info.reduction.kept], dim=1)
        assert torch.equal(kept, case[f"stage{s}/keep_idx"].long())
        torch.testing.assert_close(
            info.attention[:, 1:], case[f"stage{s}/cls_attn"], atol=1e-6, rtol=0
        )
        merged = info.reduction.weights.gather(1, case[f"stage{s}/merge_idx"].long())
        torch.testing.assert_close(merged, case[f"stage{s}/merge_w"], atol=2e-6, rtol=0)


def check_gradients(got, expected):
    """Check that gradients of the same name differ by at most 1e-5 of the largest entry."""
    largest = max(grad.abs().max() for grad in expected.values())
    missing = expected.keys() - got.keys()
    assert not missing
    for name, grad in expected.items():
        bound = 1e-5 * max(grad.abs().max(), 1e-3 * largest)
        assert (got[name].reshape(grad.shape) - grad).abs().max() <= bound, name


def pretraining_fields(meta):
    """Return fields of ALBEF's and BLIP's configs from the description of a golden case."""
    bert, vit = meta["bert"], meta["vit"]
    return {
        "image_size": meta["image"],
        "patch_size": meta["patch"],
        "vision_width": vit["embed_dim"],
        "vision_depth": vit["depth"],
        "vision_heads": vit["num_heads"],
        "vision_mlp_ratio": vit["mlp_ratio"],
        "text_width": bert["hidden_size"],
        "text_depth": bert["num_hidden_layers"],
        "text_heads": bert["num_attention_heads"],
        "text_hidden": bert["intermediate_size"],
        "text_dropout": 0.0,
        "vocab_size": bert["vocab_size"],
        "max_positions": bert["max_position_embeddings"],
        "context_length": 10,
        "embed_dim": meta["embed_dim"],
        "queue_size": meta["queue_size"],
        "momentum": meta["momentum"],
        "alpha": meta["alpha"],
        "cls_token_id": 1,
        "sep_token_id": 2,
        "schedule": "1(100%) 1(90%) 2(65%) 2(40%)",
    }


def load_official_(model, case, our_name):
    """Load the weights of a golden case, and return the names of the weights that it lacks."""
    own = model.state_dict()
    weights = {our_name(name): weight for name, weight in case.under("sd/").items()}
    weights = {name: w.view(own[name].shape).to(own[name].dtype) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    return missing
