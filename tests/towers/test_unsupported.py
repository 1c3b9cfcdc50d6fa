"""A model that has no tower raises an error with the reason and what to do instead."""

import pytest
import timm
import torch
import transformers
from torch import nn

import elip_models
from tests.helpers.models import hf_vision
from tests.helpers.towers import plain_vit

PLAIN = r"take a plain ViT, such as timm.create_model\('vit_base_patch16_224'\)"
TRANSFORMERS = {
    "TimmWrapperModel": r"pass its \.timm_model",
    "RfDetrForObjectDetection": f"backbone, rf_detr_dinov2, attends in windows.*{PLAIN}",
    "DepthProModel": f"several ViTs over an image and crops.*{PLAIN}",
    "ViTMAEModel": r"at random in every call.*ViTModel\.from_pretrained loads its checkpoint",
    "SwinModel": f"attends in windows.*{PLAIN}",
    "DetrForObjectDetection": f"backbone, resnet50, is a convolutional network.*{PLAIN}",
    "UperNetForSemanticSegmentation": f"backbone, resnet, is a convolutional network.*{PLAIN}",
    "ConvNextModel": f"is a convolutional network.*{PLAIN}",
    "TimesformerModel": "over the patches of one frame.*VideoMAE and V-JEPA 2 are supported",
    "WhisperModel": "reads audio.*pass an image model",
    "BertModel": "reads text alone.*such as CLIPModel or LlavaForConditionalGeneration",
    "Glm4vModel": "an image tower of its own kind.*supported, also inside other models",
}
SMALL = {
    "TimmWrapperModel": {"architecture": "test_vit"},
    "Glm4vModel": {"text_config": {"num_hidden_layers": 1}},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_of_transformers_is_refused_by_its_kind(name):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**SMALL.get(name, {})))
    with pytest.raises(TypeError, match=f"got {name}: its? .*{TRANSFORMERS[name]}"):
        elip_models.reduce_(model, "merge")


def of_library(name):
    """Return a model whose class is defined in another library."""
    return type("Model", (nn.Module,), {"__module__": f"{name}.models"})()


def test_models_of_other_libraries_and_parts_say_what_to_pass():
    torchvision = pytest.importorskip("torchvision")
    wrapper = nn.ModuleDict({"trunk": nn.Sequential(plain_vit())})
    with torch.device("meta"):
        vit_b_16 = torchvision.models.vit_b_16()
        resnet18 = torchvision.models.resnet18()
        swin_t = torchvision.models.swin_t()
        features = timm.create_model("test_vit", features_only=True)
    cases = {
        r"torchvision.*timm.create_model\('vit_base_patch16_224'\)": vit_b_16,
        "ResNet: it is a convolutional network": resnet18,
        "SwinTransformer: it attends in windows": swin_t,
        r"pipe\.image_encoder": of_library("diffusers"),
        r"pass model\[1\]\.trunk\[0\]$": nn.Sequential(nn.Identity(), wrapper),
        r"pass model\[0\]$": nn.Sequential(features),
        f"no model inside it can be reduced; {PLAIN}": of_library("monai.networks"),
        "a part of a model; pass the whole": hf_vision("ViTModel", "ViTConfig").layers[0],
    }
    cases[r"pass the model inside a pipeline or an engine, such as pipe\.model"] = object()
    for reason, model in cases.items():
        with pytest.raises(TypeError, match=reason):
            elip_models.reduce_(model)
