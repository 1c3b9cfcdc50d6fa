"""Why models of other kinds have no tower, and what to do instead, in words for an error."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

PLAIN = "take a plain ViT, such as timm.create_model('vit_base_patch16_224')"
WINDOWS = f"attends in windows of its grid of patches, which need every token; {PLAIN}"
STAGES = f"pools or convolves its grid of patches, which needs every token; {PLAIN}"
CONVOLUTIONAL = f"is a convolutional network, which has no tokens to drop; {PLAIN}"
VIDEO = (
    "reads videos with attention of its own, which no adapter reads yet; ViViT, VideoMAE and "
    "V-JEPA 2 are supported"
)
PART = "is a part of a model; pass the whole model"
NOT_YET = "which no adapter reads yet"
UNKNOWN = f"is of none of these libraries, and no model inside it can be reduced; {PLAIN}"

TIMM = {
    "cait": "mixes its attention heads before and after the softmax, and adds its class token in "
    f"its last layers; {PLAIN}",
    "convit": "gates its attention by the positions of patches, which would not follow the tokens; "
    f"{PLAIN}",
    "crossvit": f"runs two branches of patches side by side; {PLAIN}",
    "deepseek_vit": f"is another plain ViT (DeepSeek's encoder), {NOT_YET}; {PLAIN}",
    "gemma4_vit": f"is another plain ViT (Gemma's encoder), {NOT_YET}; {PLAIN}",
    "qwen3_vit": f"is another plain ViT (Qwen's encoder), {NOT_YET}; {PLAIN}",
    "swin_transformer* hiera* davit gcvit maxxvit twins nest": WINDOWS,
    "tnt": f"runs a second transformer over the pixels of every patch; {PLAIN}",
    "vision_transformer_sam": WINDOWS,
    "convnext* resnet* regnet *efficientnet* mobilenetv[35] densenet vgg": CONVOLUTIONAL,
    "_features*": f"is split into stages by features_only=True, as no plain ViT is; {PLAIN}",
    "*": f"is windowed, hierarchical or convolutional, which needs every token; {PLAIN}",
}
"""Reasons for the models in these files of timm, as patterns of their names."""

TRANSFORMERS = {
    "timm_wrapper gemma3n_vision": "wraps a timm model; pass its .timm_model",
    "timm_backbone": "wraps a timm model; pass its ._backbone",
    "eomt*": f"adds its queries to the patches between its layers, {NOT_YET}; {PLAIN}",
    "vit_mae": "masks and shuffles its patches at random in every call, also in evaluation; "
    "ViTModel.from_pretrained loads its checkpoint, and reads all patches in order",
    "*swin* hiera sam sam2* sam3* sam_* edgetam* vitdet lw_detr* rf_detr*": WINDOWS,
    "pvt* levit cvt segformer glpn focalnet poolformer mobilevit* swiftformer": STAGES,
    "convnext* dinov3_convnext *resnet* regnet* bit efficientnet mobilenet_* align": CONVOLUTIONAL,
    "hgnet* textnet": CONVOLUTIONAL,
    "yolos": "has detection tokens after its patches, and adds embeddings of all positions between "
    f"its layers, which need every token; {PLAIN}",
    "depth_pro": f"runs several ViTs over an image and crops of it, {NOT_YET}; {PLAIN}",
    "seggpt": "adds a bias by the rows and columns of its grid of patches, which needs every "
    f"token; {PLAIN}",
    "timesformer": "attends over the frames of one patch, and then over the patches of one frame, "
    "which needs every token; ViViT, VideoMAE and V-JEPA 2 are supported",
    "xclip pe_video*": VIDEO,
}
"""Reasons for models of transformers, as patterns of `config.model_type`."""

MODALITIES = {
    "video": VIDEO,
    "audio": "reads audio, and tokens of images alone can be reduced; pass an image model",
    "time": "reads time series, and tokens of images alone can be reduced; pass an image model",
    "text": "reads text alone, and tokens of images alone can be reduced; pass an image model, or "
    "an image-text model such as CLIPModel or LlavaForConditionalGeneration",
}
LANGUAGE = (
    f"has an image tower of its own kind, {NOT_YET}; towers of CLIP, SigLIP, ViT, DeiT, "
    "BLIP, DINOv2 and DINOv3 are supported, also inside other models, such as "
    "LlavaForConditionalGeneration"
)
IMAGES = (
    f"has layers {NOT_YET}; CLIP, SigLIP, ViT, DeiT, BLIP, DINOv2, DINOv3 and others of "
    "transformers are supported, and most timm ViTs"
)

LIBRARIES = {
    "torchvision.*vision_transformer": "is of torchvision, which keeps the blocks of a ViT in "
    "encoder.layers where no adapter reads them; timm has the same architectures, such as "
    "timm.create_model('vit_base_patch16_224') for vit_b_16",
    "torchvision.*swin_transformer torchvision.*maxvit": WINDOWS,
    " ".join(
        f"torchvision.models.{name}"
        for name in (
            *("alexnet", "convnext", "densenet", "*efficientnet", "googlenet", "inception"),
            *("mnasnet", "mobilenet*", "regnet", "resnet", "shufflenetv2", "squeezenet", "vgg"),
        )
    ): CONVOLUTIONAL,
    "diffusers.*": "is of diffusers, whose models return a grid and so need every token; tokens of "
    "image encoders alone can be reduced, such as pipe.image_encoder",
}
"""Reasons for models of other libraries, as patterns of the modules that define their classes."""


def timm_reason(model: nn.Module) -> str:
    """Return why a timm model that is no VisionTransformer and no Eva cannot be reduced."""
    return f"it {first_match(TIMM, type(model).__module__.rpartition('.')[2])}"


def transformers_reason(model: nn.Module) -> str:
    """Return why a transformers model without a known tower cannot be reduced."""
    if not hasattr(model, "main_input_name"):
        return f"it {PART}"
    backbone = getattr(model.config, "backbone_config", None)  # its `backbone` is a name of timm
    kind = getattr(backbone, "model_type", "")
    name = getattr(backbone, "backbone", None) or kind
    if reason := first_match(TRANSFORMERS, name) or first_match(TRANSFORMERS, kind):
        return f"its backbone, {name}, {reason}"
    return f"it {first_match(TRANSFORMERS, model.config.model_type) or _modality_reason(model)}"


def other_reason(model: nn.Module, inside: Sequence[str]) -> str:
    """Return why a model of another library cannot be reduced.

    `inside` is how code writes the image models in a wrapper, such as 'model[0]'.
    """
    if inside:
        return f"it is a wrapper; pass {' or '.join(inside)}"
    reasons = (first_match(LIBRARIES, cls.__module__) for cls in type(model).__mro__)
    return f"it {next(filter(None, reasons), UNKNOWN)}"


def check_module(model: Any, other: Any = None, function: str = "") -> None:
    """Raise TypeError if the argument `model` is no module; the message has what to pass instead.

    `other` is a further argument of `function`, which gets the model if the two are swapped.
    """
    if isinstance(model, nn.Module):
        return
    got = type(model).__name__
    if isinstance(other, nn.Module):
        remedy = f"pass the model first: {function}(model, ..)"
    elif isinstance(model, type):
        got, remedy = f"the class {model.__name__}", "pass an instance"
    elif isinstance(model, str):
        remedy = "open a model by its name with elip_models.open_model, and pass that"
    elif isinstance(model, Tensor):
        remedy = "pass the model that reads it"
    elif isinstance(model, list | tuple) and any(isinstance(item, nn.Module) for item in model):
        remedy = "pass one model of it, such as its first item"
    else:
        remedy = "pass the model inside a pipeline or an engine, such as pipe.model"
    raise TypeError(f"model: expected an nn.Module, got {got}; {remedy}")


def _modality_reason(model: nn.Module) -> str:
    """Return the reason for a model by what it reads."""
    kinds = model.input_modalities
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if kinds == {"text"} and model.main_input_name == "pixel_values":
        kinds = {"image"}  # "text" is the default, where a class sets none
    if "image" in kinds:
        return LANGUAGE if "text" in kinds else IMAGES
    return next(reason for kind, reason in MODALITIES.items() if kind in kinds)


def first_match(table: Mapping[str, str], name: str) -> str | None:
    """Return the value of the first key that has a pattern of the name, or None."""
    reasons = (
        reason
        for patterns, reason in table.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns.split())
    )
    return next(reasons, None)
