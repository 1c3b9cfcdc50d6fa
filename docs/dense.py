"""Write the tables of dense.md: CamVid, and which models that read every patch can be reduced.

python docs/dense.py             # rewrite the blocks between their markers
python docs/dense.py --check     # exit status 1 if a block is stale

The script builds a small model of each kind with random weights, and reduces it by merging.
tests/towers/test_dense_models.py compares the outputs of those that work with oracles.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import transformers
from torch import nn

import elip_models
from benchmarks.marked_block import Block, run
from benchmarks.real.panel_tables import camvid_table
from elip_models.saving.files import read_object
from elip_models.towers import as_tower
from elip_models.vlm.strategy_list import reason_of

PAGE = Path(__file__).with_name("dense.md")
CAMVID = PAGE.parents[1] / "benchmarks" / "results" / "real" / "camvid.json"
SIDE, PATCH, WIDTH = 48, 8, 32
STAGES = ["stage1", "stage2", "stage4", "stage6"]
ALONE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
VIT = ALONE | {"intermediate_size": 64}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 49,
}
TWO_TOWERS = {"vision_config": VIT, "text_config": TEXT, "projection_dim": WIDTH}
NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
DPT = NECK | {"is_hybrid": False}
ANYTHING = NECK | {"patch_size": PATCH, "reassemble_hidden_size": WIDTH, "head_hidden_size": 4}
ZOE = NECK | {
    "bottleneck_features": 8,
    "backbone_hidden_size": WIDTH,
    "num_relative_features": 8,
    "bin_configurations": [{"n_bins": 8, "min_depth": 0.1, "max_depth": 10.0, "name": "nyu"}],
    "bin_embedding_dim": 8,
    "num_attractors": [4, 2, 2, 1],
}
UPERNET = {"hidden_size": 8, "pool_scales": [1, 2], "use_auxiliary_head": False, "num_labels": 5}
MASKS = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 4,
    "feature_strides": [PATCH] * 4,
}
DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
}
BOXES = {
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_ffn_dim": 16,
    "encoder_in_channels": [WIDTH],
    "feat_strides": [PATCH],
    "num_feature_levels": 1,
    "decoder_in_channels": [16],
    "encode_proj_layers": [0],
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "decoder_layers": 2,
    "num_queries": 4,
    "num_labels": 3,
    "anchor_image_size": None,
}
MATTING = {"fusion_hidden_sizes": [8] * 4, "convstream_hidden_sizes": [4] * 3}
POSE = {"out_features": STAGES[-1:], "image_size": [SIDE] * 2, "patch_size": [PATCH] * 2}
WINDOWED = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}


def config(name: str, *parts: dict[str, Any], **options: Any) -> Any:
    """Return a config of transformers with the options of all parts."""
    for part in parts:
        options = part | options
    return getattr(transformers, f"{name}Config")(**options)


def dinov2(**options: Any) -> Any:
    """Return the config of a DINOv2 backbone."""
    sizes = ALONE | {"mlp_ratio": 2, "layerscale_value": 0.3, "out_features": STAGES}
    return config("Dinov2", sizes, **options)


def registers() -> Any:
    """Return the config of a DINOv2 backbone with registers."""
    sizes = ALONE | {"mlp_ratio": 2, "layerscale_value": 0.3, "out_features": STAGES}
    return config("Dinov2WithRegisters", sizes, num_register_tokens=3)


def dinov3() -> Any:
    """Return the config of a DINOv3 backbone."""
    return config("DINOv3ViT", VIT, num_register_tokens=3, out_features=STAGES)


def beit(**options: Any) -> Any:
    """Return the config of a BEiT backbone."""
    return config("Beit", VIT, use_relative_position_bias=True, out_features=STAGES, **options)


def vitpose(**options: Any) -> Any:
    """Return the config of the backbone of VitPose."""
    return config("VitPoseBackbone", ALONE | POSE, mlp_ratio=2, **options)


def build(name: str, family: str, *parts: dict[str, Any], **options: Any) -> nn.Module:
    """Return a model of transformers; a function among the options makes a config."""
    made = {key: value() if callable(value) else value for key, value in options.items()}
    return getattr(transformers, name)(config(family, *parts, **made))


def backbone(make: Callable[[], Any]) -> nn.Module:
    """Return what `AutoBackbone` makes of a config."""
    return transformers.AutoBackbone.from_config(make())


def timm_vit(**options: Any) -> nn.Module:
    """Return a small ViT of timm."""
    return timm.create_model("test_vit", img_size=SIDE, patch_size=PATCH, depth=6, **options)


def with_backbone(
    name: str, family: str, *parts: dict[str, Any], **options: Any
) -> Callable[..., nn.Module]:
    """Return a function that builds a model of transformers around a backbone."""

    def make(backbone_config: Callable[[], Any]) -> nn.Module:
        return build(name, family, *parts, backbone_config=backbone_config, **options)

    return make


depth_anything = with_backbone("DepthAnythingForDepthEstimation", "DepthAnything", ANYTHING)
mask2former = with_backbone("Mask2FormerForUniversalSegmentation", "Mask2Former", MASKS)
upernet = with_backbone("UperNetForSemanticSegmentation", "UperNet", UPERNET)
zoedepth = with_backbone("ZoeDepthForDepthEstimation", "ZoeDepth", ZOE)
flat = partial(dinov2, reshape_hidden_states=False)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "`DPTForDepthEstimation`": partial(
        build, "DPTForDepthEstimation", "DPT", VIT | DPT, backbone_out_indices=[1, 2, 3, 5]
    ),
    "`DPTForDepthEstimation`, DINOv2": partial(
        build, "DPTForDepthEstimation", "DPT", ALONE | DPT, backbone_config=flat
    ),
    "`DPTForSemanticSegmentation`": partial(
        build, "DPTForSemanticSegmentation", "DPT", VIT | DPT, backbone_out_indices=[1, 2, 3, 5]
    ),
    "`DepthAnythingForDepthEstimation`, DINOv2": partial(depth_anything, flat),
    "`ZoeDepthForDepthEstimation`, BEiT": partial(
        zoedepth, partial(beit, reshape_hidden_states=False)
    ),
    "`UperNetForSemanticSegmentation`, DINOv2": partial(upernet, dinov2),
    "`UperNetForSemanticSegmentation`, DINOv3": partial(upernet, dinov3),
    "`UperNetForSemanticSegmentation`, BEiT": partial(upernet, beit),
    "`UperNetForSemanticSegmentation`, ResNet": partial(
        build, "UperNetForSemanticSegmentation", "UperNet"
    ),
    "`UperNetForSemanticSegmentation`, a ViT of timm": partial(
        upernet,
        partial(
            config,
            "TimmBackbone",
            backbone="test_vit",
            use_pretrained_backbone=False,
            out_indices=[1, 2, 3, 4],
        ),
    ),
    "`Mask2FormerForUniversalSegmentation`, DINOv2": partial(mask2former, dinov2),
    "`Mask2FormerForUniversalSegmentation`, Swin": partial(
        build, "Mask2FormerForUniversalSegmentation", "Mask2Former", MASKS
    ),
    "`MaskFormerForInstanceSegmentation`, DINOv2": partial(
        build,
        "MaskFormerForInstanceSegmentation",
        "MaskFormer",
        backbone_config=dinov2,
        fpn_feature_size=32,
        mask_feature_size=32,
        decoder_config=partial(config, "Detr", DECODER),
    ),
    "`BeitForSemanticSegmentation`": partial(
        build,
        "BeitForSemanticSegmentation",
        "Beit",
        VIT,
        use_relative_position_bias=True,
        out_indices=[1, 2, 3, 4],
    ),
    "`SegformerForSemanticSegmentation`": partial(
        build, "SegformerForSemanticSegmentation", "Segformer", depths=[1] * 4
    ),
    "`EomtForUniversalSegmentation`": partial(
        build, "EomtForUniversalSegmentation", "Eomt", ALONE, num_blocks=2, num_queries=4
    ),
    "`SamModel`": partial(
        build, "SamModel", "Sam", vision_config=WINDOWED | {"global_attn_indexes": [1]}
    ),
    "`Sam2Model`": partial(build, "Sam2Model", "Sam2"),
    "`VitDetBackbone`": partial(build, "VitDetBackbone", "VitDet", WINDOWED),
    "`Dinov2Backbone`": partial(backbone, dinov2),
    "`Dinov2WithRegistersBackbone`": partial(backbone, registers),
    "`DINOv3ViTBackbone`": partial(backbone, dinov3),
    "`BeitBackbone`": partial(backbone, beit),
    "`VitPoseForPoseEstimation`": partial(
        build, "VitPoseForPoseEstimation", "VitPose", backbone_config=vitpose, num_labels=3
    ),
    "`VitPoseForPoseEstimation`, with experts": partial(
        build,
        "VitPoseForPoseEstimation",
        "VitPose",
        backbone_config=partial(vitpose, num_experts=2, part_features=8),
        num_labels=3,
    ),
    "`VitMatteForImageMatting`, DINOv2": partial(
        build,
        "VitMatteForImageMatting",
        "VitMatte",
        MATTING,
        backbone_config=partial(
            dinov2, out_features=STAGES[-1:], num_channels=4, patch_size=2 * PATCH, image_size=96
        ),
        hidden_size=WIDTH,
    ),
    "`CLIPSegForImageSegmentation`": partial(
        build,
        "CLIPSegForImageSegmentation",
        "CLIPSeg",
        TWO_TOWERS,
        extract_layers=[0, 2, 4],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    "`Owlv2ForObjectDetection`": partial(build, "Owlv2ForObjectDetection", "Owlv2", TWO_TOWERS),
    "`OwlViTForObjectDetection`": partial(build, "OwlViTForObjectDetection", "OwlViT", TWO_TOWERS),
    "`RTDetrForObjectDetection`, DINOv2 of one level": partial(
        build,
        "RTDetrForObjectDetection",
        "RTDetr",
        BOXES,
        backbone_config=partial(dinov2, out_features=STAGES[-1:]),
    ),
    "`RfDetrForObjectDetection`": partial(build, "RfDetrForObjectDetection", "RfDetr"),
    "`LwDetrForObjectDetection`": partial(build, "LwDetrForObjectDetection", "LwDetr"),
    "`DepthProForDepthEstimation`": partial(build, "DepthProForDepthEstimation", "DepthPro"),
    "timm ViT, `forward_intermediates`": timm_vit,
    "timm ViT, `features_only=True`": partial(timm_vit, features_only=True),
    "timm Swin, `features_only=True`": partial(
        timm.create_model, "swin_tiny_patch4_window7_224", features_only=True
    ),
}
"""Functions that build a model, by its name in the table."""
LARGE = ("Sam2", "RfDetr", "LwDetr", "DepthPro", "ResNet", "Swin")
"""Words in the names of models that are built on the meta device."""


def made(name: str) -> nn.Module:
    """Return a model of the table."""
    import torch

    with torch.device("meta" if any(word in name for word in LARGE) else "cpu"):
        return MODELS[name]()


def answer(name: str) -> str:
    """Return the cells of a model: what reads its grids, or why it cannot be reduced."""
    model = made(name)
    try:
        elip_models.reduce_(model, "merge")
    except TypeError as error:
        return f"no | {reason_of(error)}"
    reason = as_tower(model).refuses_dropping()
    return f"yes | {reason or 'a call for tokens of several blocks'}"


def camvid() -> str:
    """Return the table of CamVid, and what it shows."""
    document = read_object(CAMVID)
    return (
        f"CamVid, {document['model']}: mIoU in points minus that of the dense model "
        f"({100 * document['dense']['own']:.1f}), with 95% intervals. The kept "
        "head was fitted on dense features, the refitted one on those of the setting; both are "
        "linear. Times are relative to dense and include whole grids of the last block. Pixels are "
        "the height of the image.\n\n"
        f"{camvid_table(document)}"
    )


def table() -> str:
    """Return the table of models."""
    rows = (f"| {name} | {answer(name)} |" for name in MODELS)
    return "\n".join(
        [
            "| model | reduced | what reads whole grids, or the reason |",
            "| --- | :-: | --- |",
            *rows,
        ]
    )


def blocks() -> list[Block]:
    """Return the two tables."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # hides notes on ViT backbones
    return [Block(PAGE, "dense_camvid", camvid()), Block(PAGE, "dense_models", table())]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    return run(blocks, "python docs/dense.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
