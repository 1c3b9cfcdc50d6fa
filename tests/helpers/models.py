"""Small models of every library and form that is supported, which the tests share."""

import open_clip
import timm
import torch
import transformers
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

import elip_models
from tests.helpers.towers import WIDTH, clip_vit, plain_vit

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
BEIT = {"img_size": 48, "patch_size": 8, "embed_dim": WIDTH, "depth": 6, "num_heads": 2}
BEIT |= {"num_classes": 5}
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


def beit(**options):
    defaults = {"use_rel_pos_bias": True, "init_values": 0.3, "qkv_bias": True}
    defaults |= {"global_pool": "token"}
    model = Beit(**BEIT, **(defaults | options))
    for block in model.blocks:
        if block.attn.q_bias is not None:
            nn.init.normal_(block.attn.q_bias, std=0.2)
    return enlarged(model)


def relative_positions(**options):
    defaults = {"class_token": True, "global_pool": "token", "rel_pos_type": "bias"}
    return enlarged(VisionTransformerRelPos(**BEIT, **(defaults | options)))


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


def dinov2(model="Dinov2Model", config="Dinov2Config", **options):
    return hf_vision(model, config, mlp_ratio=2, layerscale_value=0.3, **options)


def dinov2_registers():
    names = "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"
    return dinov2(*names, num_register_tokens=3, use_swiglu_ffn=True)


def dinov3():
    options = {"num_register_tokens": 3, "layerscale_value": 0.3, "use_gated_mlp": True}
    options |= {"pos_embed_rescale": None}  # which would draw positions in training
    return hf_vision("DINOv3ViTModel", "DINOv3ViTConfig", **options)


def naflex(**options):
    sizes = {"patch_size": 8, "embed_dim": WIDTH, "depth": 6, "num_heads": 2}
    config = NaFlexVitCfg(**(sizes | {"pos_embed_grid_size": (6, 6)} | options))
    return enlarged(NaFlexVit(config, num_classes=5))


def siglip_vision(attention="sdpa", **options):
    options |= {"attn_implementation": attention}
    return hf_vision("SiglipVisionModel", "SiglipVisionConfig", **options)


def hf_classifier(family):
    """One that averages the patches of the image tower of a whole model."""
    config = getattr(transformers, f"{family}Config")(vision_config=HF, num_labels=5)
    return enlarged(getattr(transformers, f"{family}ForImageClassification")(config))


OPEN_CLIP_VISION = {"layers": 6, "width": WIDTH, "head_width": 16} | SIZES
OPEN_CLIP_TEXT = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2}


def open_clip_pair(custom_text=False, embed_dim=16, **vision):
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return kind(embed_dim, OPEN_CLIP_VISION | vision, OPEN_CLIP_TEXT, output_dict=True)


def trunk_pair(trunk, embed_dim, head=None):
    """An open_clip CLIP around a model of timm, which its configs know by name."""
    model = open_clip_pair(custom_text=True, embed_dim=embed_dim)
    model.visual = open_clip.timm_model.TimmModel("test_vit", embed_dim, pool="token", proj="none")
    model.visual.trunk = trunk
    model.visual.head = nn.Sequential() if head is None else nn.Sequential(nn.Dropout(), head)
    return model


def coca():
    vision = OPEN_CLIP_VISION | {"attentional_pool": True, "attn_pooler_heads": 2}
    vision |= {"attn_pooler_queries": 7, "output_tokens": True}
    text = OPEN_CLIP_TEXT | {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 1}
    return enlarged(open_clip.CoCa(24, decoder, text, vision))


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
    "HF DINOv2": lambda: dinov2(drop_path_rate=0.1),
    "HF DINOv2 registers": dinov2_registers,
    "HF DINOv3": dinov3,
    "HF Data2Vec": lambda: hf_vision(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        **{"use_relative_position_bias": True, "use_mean_pooling": False, "num_labels": 5},
    ),
    "timm NaFlex": lambda: naflex(
        global_pool="token", class_token=True, reg_tokens=2, init_values=0.3
    ),
    "timm BEiT": beit,
    "timm relative positions": relative_positions,
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
BIASED = {
    "BEiT, shared bias": lambda: beit(
        use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=True
    ),
    "BEiT, no class bias": lambda: beit(use_rel_pos_bias=False, qkv_bias=False),
    "relative positions, no CLS": lambda: relative_positions(
        class_token=False, global_pool="avg", rel_pos_type="mlp", qk_norm=True
    ),
    "relative positions, shared": lambda: relative_positions(
        rel_pos_type="mlp", shared_rel_pos=True, init_values=0.3
    ),
}
POOLED = {
    "timm average": lambda: plain_vit(global_pool="avg"),
    "timm average and maximum": lambda: plain_vit(global_pool="avgmax", reg_tokens=2),
    "timm attention, CLS": lambda: plain_vit(global_pool="map", pool_include_prefix=True),
    "EVA-02 average": lambda: eva(global_pool="avg", mlp_ratio=8 / 3, swiglu_mlp=True),
    "Perception Encoder": lambda: eva(
        global_pool="map",
        attn_type="rope",
        use_pre_transformer_norm=True,
        rope_grid_indexing="xy",
    ),
    "open_clip average": lambda: open_clip_vit(pool_type="avg"),
    "open_clip average, norm behind": lambda: open_clip_vit(
        pool_type="avg", final_ln_after_pool=True
    ),
    "open_clip attention": lambda: open_clip_vit(
        attentional_pool=True, attn_pooler_queries=7, attn_pooler_heads=2
    ),
    "HF CLIP average": lambda: hf_classifier("CLIP"),
    "HF DINOv2 average": lambda: dinov2("Dinov2ForImageClassification", num_labels=5),
}
WITHOUT_CLS = {
    "HF SigLIP vision": lambda: siglip_vision(attention_dropout=0.1),
    "HF SigLIP vision, eager": lambda: siglip_vision("eager"),
}
POOLED_WITHOUT_CLS = {
    "timm SigLIP": lambda: plain_vit(global_pool="map", class_token=False),
    "timm NaFlex attention": lambda: naflex(global_pool="map"),
    "timm NaFlex average": lambda: naflex(global_pool="avg", reg_tokens=1, qk_norm=True),
    "timm average, register": lambda: plain_vit(
        global_pool="avg", class_token=False, reg_tokens=1, qk_norm=True
    ),
    "rope average, no CLS": lambda: eva(
        attn_type="rope", global_pool="avg", class_token=False, use_abs_pos_emb=False
    ),
    "HF SigLIP average": lambda: hf_classifier("Siglip"),
}
PAIRS = {
    "open_clip pair": open_clip_pair,
    "open_clip pair, custom text": lambda: open_clip_pair(custom_text=True),
    "open_clip pair, average": lambda: open_clip_pair(pool_type="avg"),
    "open_clip pair, timm SigLIP": lambda: trunk_pair(
        plain_vit(global_pool="map", class_token=False, num_classes=0), WIDTH
    ),
    "open_clip pair, timm EVA-02": lambda: trunk_pair(eva(num_classes=16), 16),
    "open_clip pair, timm and linear": lambda: trunk_pair(
        plain_vit(global_pool="avg", num_classes=0), 16, nn.Linear(WIDTH, 16, bias=False)
    ),
    "HF CLIP pair": hf_clip,
    "HF BLIP pair": hf_blip,
    "HF SigLIP pair": hf_siglip,
}


UNGUIDED_PAIRS = {"open_clip CoCa": coca}


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


def output_of_guided_pair(model, x, tokens):
    """The same of a reduced model, when each text guides its image."""
    with elip_models.guidance(model, paired=True):
        return output_of_pair(model, x, tokens)


def output_of_pair(model, x, tokens):
    """What a whole model says of its images, given their texts."""
    if hasattr(model, "visual"):
        return model(x, tokens)["image_features"]
    out = model(input_ids=tokens, pixel_values=x)
    return out["image_embeds"] if "image_embeds" in out else out["itm_score"]
