"""The layers of transformers' vision models, one row of names for each class."""

from elip_models.towers.tower_parts import BlockNames, per_sublayer

CLIP = BlockNames("self_attn", "layer_norm1", "layer_norm2", "post_layernorm", ("out_proj",))
BLIP = CLIP._replace(out=("projection",), qkv=("qkv",))
VIT = BlockNames(
    attn="attention",
    norm1="layernorm_before",
    norm2="layernorm_after",
    norm="layernorm",
    out=("o_proj",),
    after=per_sublayer("dropout"),
)
DINO = BlockNames(
    attn="attention",
    norm1="norm1",
    norm2="norm2",
    norm="layernorm",
    out=("o_proj",),
    after=per_sublayer("layer_scale{}", "drop_path"),
)
VIDEO_MAE = VIT._replace(
    qkv=("attention.query", "attention.key", "attention.value"),
    out=("output.dense", "output.dropout"),
    mlp=("intermediate", "output.dense", "output.dropout"),
    after=((), ()),
)
LAYERS = {
    "CLIPEncoderLayer": CLIP,
    "CLIPSegEncoderLayer": CLIP,
    "MetaClip2EncoderLayer": CLIP,
    "AltCLIPEncoderLayer": CLIP,
    "MLCDEncoderLayer": CLIP,
    "ChineseCLIPVisionLayer": CLIP,
    "GitVisionEncoderLayer": CLIP,
    "Kosmos2VisionEncoderLayer": CLIP,
    "OwlViTEncoderLayer": CLIP,
    "Owlv2EncoderLayer": CLIP,
    "SiglipEncoderLayer": CLIP,
    "Siglip2EncoderLayer": CLIP,
    "JanusVisionEncoderLayer": CLIP._replace(out=("projection_layer", "projection_dropout")),
    "Idefics2EncoderLayer": CLIP,
    "Idefics3EncoderLayer": CLIP,
    "SmolVLMEncoderLayer": CLIP,
    "BlipEncoderLayer": BLIP,
    "Blip2EncoderLayer": BLIP,
    "InstructBlipEncoderLayer": BLIP,
    "ViTLayer": VIT,
    "DeiTLayer": VIT,
    "IJepaLayer": VIT,
    "ViTMSNLayer": VIT,
    "BeitLayer": VIT._replace(after=per_sublayer("dropout", "lambda_{}", "drop_path")),
    "PixioLayer": VIT._replace(after=per_sublayer("dropout", "drop_path")),
    "ASTLayer": VIT,
    "VivitLayer": VIT,
    "VideoMAELayer": VIDEO_MAE,
    "DPTViTLayer": VIDEO_MAE,
    "Data2VecVisionLayer": VIDEO_MAE._replace(
        after=per_sublayer("lambda_{}", "drop_path"),
        bias="attention.attention.relative_position_bias",
        returns_tuple=True,
    ),
    "VJEPA2Layer": DINO._replace(
        qkv=("query", "key", "value"),
        out=("proj",),
        after=per_sublayer("drop_path"),
        returns_tuple=True,
    ),
    "Dinov2Layer": DINO,
    "Dinov2WithRegistersLayer": DINO,
    "Tipsv2VisionLayer": DINO,
    "DINOv3ViTLayer": DINO._replace(norm="norm"),
    "InternVLVisionLayer": VIT._replace(
        out=("projection_layer", "projection_dropout"),
        mlp=("mlp", "dropout"),
        after=per_sublayer("lambda_{}"),
    ),
    "Aimv2EncoderLayer": BlockNames(
        "attention", "rms_norm1", "rms_norm2", "rms_norm", ("out_proj",), mlp=("ffn",)
    ),
}
"""By the name of the class."""
