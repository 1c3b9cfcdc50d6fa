"""The layers of transformers' vision models, one row of names for each class."""

from elip_models.towers.tower_data import BlockNames, per_sublayer

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
CLIP_LAYERS = (
    "CLIPEncoderLayer CLIPSegEncoderLayer MetaClip2EncoderLayer AltCLIPEncoderLayer "
    "MLCDEncoderLayer ChineseCLIPVisionLayer GitVisionEncoderLayer Kosmos2VisionEncoderLayer "
    "OwlViTEncoderLayer Owlv2EncoderLayer SiglipEncoderLayer Siglip2EncoderLayer "
    "Idefics2EncoderLayer Idefics3EncoderLayer SmolVLMEncoderLayer"
)
LAYERS = {
    **dict.fromkeys(CLIP_LAYERS.split(), CLIP),
    **dict.fromkeys(("BlipEncoderLayer", "Blip2EncoderLayer", "InstructBlipEncoderLayer"), BLIP),
    **dict.fromkeys(
        ("ViTLayer", "DeiTLayer", "IJepaLayer", "ViTMSNLayer", "ASTLayer", "VivitLayer"), VIT
    ),
    "JanusVisionEncoderLayer": CLIP._replace(out=("projection_layer", "projection_dropout")),
    "BeitLayer": VIT._replace(after=per_sublayer("dropout", "lambda_{}", "drop_path")),
    "PixioLayer": VIT._replace(after=per_sublayer("dropout", "drop_path")),
    "VideoMAELayer": VIDEO_MAE,
    "DPTViTLayer": VIDEO_MAE,
    "VitPoseBackboneLayer": VIDEO_MAE._replace(mlp=("mlp",)),
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
