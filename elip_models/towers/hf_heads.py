"""What transformers models do with the tokens of their image tower."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import (
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    CLIPForImageClassification,
    CLIPSegForImageSegmentation,
    Data2VecVisionForSemanticSegmentation,
    DeiTForMaskedImageModeling,
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    IJepaForImageClassification,
    JanusVisionModel,
    MetaClip2ForImageClassification,
    Owlv2ForObjectDetection,
    OwlViTForObjectDetection,
    Siglip2ForImageClassification,
    SiglipForImageClassification,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    ViTForMaskedImageModeling,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)
from transformers.backbone_utils import BackboneMixin

AVERAGED = (
    CLIPForImageClassification,
    IJepaForImageClassification,
    MetaClip2ForImageClassification,
    SiglipForImageClassification,
    Siglip2ForImageClassification,
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
    VideoMAEForVideoClassification,
    VJEPA2ForVideoClassification,  # attends to them
)
DENSE_HEADS = (
    BeitForSemanticSegmentation,
    CLIPSegForImageSegmentation,
    Data2VecVisionForSemanticSegmentation,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
)
DETECTORS = (OwlViTForObjectDetection, Owlv2ForObjectDetection)
PIXEL_DECODERS = (
    BeitForMaskedImageModeling,
    DeiTForMaskedImageModeling,
    VideoMAEForPreTraining,
    ViTForMaskedImageModeling,
)


def averages(model: nn.Module, trunk: nn.Module) -> bool:
    """Return whether a head or the pooler of the image tower averages the patches, or attends."""
    has_pooler = getattr(trunk, "pooler", None) is not None
    pools = has_pooler and getattr(trunk.config, "use_mean_pooling", False)  # of BEiT
    return isinstance(model, AVERAGED) or pools


def needs_grid(model: nn.Module, around: Sequence[nn.Module]) -> str | None:
    """Return why the image tower must return a token for each patch, or None if it need not.

    `around` are the modules of the model that contain the blocks.
    """
    if isinstance(model, PIXEL_DECODERS):
        return "it decodes pixels from its patches, each at its position"
    if isinstance(model, DETECTORS):
        return "its heads give a box for each patch"
    if isinstance(model, VJEPA2Model):
        return "its predictor reads a token for each patch at its position"
    if isinstance(model, JanusVisionModel):
        return "its pooled output is the token of its first patch"
    if isinstance(model, DENSE_HEADS):
        return "its head reads a grid of patches"
    if language_config(around) is not None:
        return "its language model has a token for each patch of the image"
    if any(isinstance(module, BackboneMixin) for module in around):
        return "its feature maps have a position for each patch"
    return None


def reads_layers(around: Sequence[nn.Module]) -> bool:
    """Return whether a language model reads the tokens of single layers, and no pooled output."""
    return hasattr(language_config(around), "vision_feature_layer")


def language_config(around: Sequence[nn.Module]) -> Any:
    """Return the config of a model that inserts image tokens into a text, or None."""
    configs = (getattr(module, "config", None) for module in around)
    names = ("image_token_id", "image_token_index")
    return next((c for c in configs if any(hasattr(c, name) for name in names)), None)
