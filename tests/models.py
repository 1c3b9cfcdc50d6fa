"""Small models of every library and form that is supported, which the tests share."""

import open_clip
import timm
import torch
import transformers
from timm.models.eva import Eva
from torch import nn

from tests.towers import WIDTH, clip_vit, plain_vit

SIZES = {"image_size": 48, "patch_size": 8}
HF_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
HF = {name: v for name, v in HF_TEXT.items() if name != "vocab_size"}
HF |= {"num_hidden_layers": 6} | SIZES
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


def enlarged(model):
    """Blocks that matter, unlike those of a fresh model."""
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.2)
    return model


def distilled_vit():
    return enlarged(
        timm.models.deit.VisionTransformerDistilled(
            img_size=48, patch_size=8, embed_dim=WIDTH, depth=6, num_heads=2, num_classes=5
        )
    )


def eva(**options):
    return enlarged(Eva(**(EVA02 | options)))


def open_clip_vit(**options):
    defaults = {"width": WIDTH, "layers": 6, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16}
    tower = open_clip.transformer.VisionTransformer(**(SIZES | defaults | options))
    for block in tower.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_bias, std=0.2)
    return enlarged(tower)


def hf_vision(model, config, **options):
    """An image model of transformers by the names of its class and of its config."""
    config = getattr(transformers, config)(**(HF | options))
    return enlarged(getattr(transformers, model)(config))


def siglip_vision(attention="sdpa", **options):
    options |= {"attn_implementation": attention}
    return hf_vision("SiglipVisionModel", "SiglipVisionConfig", **options)


def open_clip_pair(custom_text=False):
    vision = {"layers": 6, "width": WIDTH, "head_width": 16} | SIZES
    text = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2}
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return kind(16, vision, text, output_dict=True)


def hf_clip():
    text = HF_TEXT | {"max_position_embeddings": 8, "eos_token_id": 49}
    config = transformers.CLIPConfig(text_config=text, vision_config=HF, projection_dim=16)
    return transformers.CLIPModel(config)


def hf_blip():
    """Enlarged, so that the score depends on what the image tower gives."""
    text = HF_TEXT | {"encoder_hidden_size": WIDTH, "max_position_embeddings": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=HF)
    return enlarged(transformers.BlipForImageTextRetrieval(config))


def hf_siglip(projection_size=WIDTH):
    text = HF_TEXT | {"max_position_embeddings": 8, "projection_size": projection_size}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=HF))


TOWERS = {
    "timm": plain_vit,
    "timm CLIP": clip_vit,
    "timm q/k norm": lambda: plain_vit(qk_norm=True),
    "timm registers": lambda: plain_vit(reg_tokens=3),
    "timm distilled": distilled_vit,
    "open_clip": open_clip_vit,
    "open_clip LayerScale": lambda: open_clip_vit(ls_init_value=0.3, act_layer=nn.SiLU),
    "open_clip own attention": lambda: open_clip_vit(
        qk_norm=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    ),
    "HF CLIP": lambda: hf_vision(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16
    ),
    "HF ViT": lambda: hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5),
    "HF DeiT": lambda: hf_vision(
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=5
    ),
    "HF BLIP": lambda: hf_vision("BlipVisionModel", "BlipVisionConfig"),
}
ROTARY = {
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
WITHOUT_CLS = {
    "HF SigLIP vision": lambda: siglip_vision(attention_dropout=0.1),
    "HF SigLIP vision, eager": lambda: siglip_vision("eager"),
}
PAIRS = {
    "open_clip pair": open_clip_pair,
    "open_clip pair, custom text": lambda: open_clip_pair(custom_text=True),
    "HF CLIP pair": hf_clip,
    "HF BLIP pair": hf_blip,
    "HF SigLIP pair": hf_siglip,
}


def output(model, x):
    """The one tensor that an image model is called for."""
    out = model(x)
    if isinstance(out, torch.Tensor):
        return out
    return next(out[n] for n in ("image_embeds", "logits", "pooler_output") if n in out)


def ids(batch=2):
    tokens = torch.randint(1, 49, (batch, 8))
    tokens[:, -1] = 49
    return tokens


def output_of_pair(model, x, tokens):
    """What a whole model says of its images, given their texts."""
    if hasattr(model, "visual"):
        return model(x, tokens)["image_features"]
    out = model(input_ids=tokens, pixel_values=x)
    return out["image_embeds"] if "image_embeds" in out else out["itm_score"]
