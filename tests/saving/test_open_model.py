"""Models by a text, with random weights and from local folders."""

import open_clip
import pytest
import timm
import torch
import transformers

from elip_models.pretraining.models.clip.model import CLIP
from elip_models.saving.open_model import open_model, split_spec
from tests.helpers.models import hf_blip, hf_clip
from tests.helpers.own_warnings import NEW_PARTS
from tests.helpers.weights import assert_equal_weights

NAMED = {
    "timm:vit_tiny_patch16_224": timm.models.VisionTransformer,
    "open_clip:ViT-B-32": open_clip.CLIP,
    "elip_clip_vit_s16": CLIP,
}
HF_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 8,
}


def tiny_vit():
    return transformers.ViTModel(transformers.ViTConfig(**HF_CONFIG), add_pooling_layer=False)


HF = {"ViTModel": tiny_vit, "CLIPModel": hf_clip, "BlipForImageTextRetrieval": hf_blip}


@pytest.mark.parametrize("spec", NAMED)
def test_names_open_on_the_meta_device(spec):
    with torch.device("meta"):
        model = open_model(spec, pretrained=False)
    assert type(model) is NAMED[spec]
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert not model.training


@NEW_PARTS
@pytest.mark.parametrize("name", HF)
def test_a_folder_of_transformers_with_and_without_weights(name, tmp_path):
    saved = HF[name]()
    saved.save_pretrained(tmp_path)
    model = open_model(f"hf:{tmp_path}")
    assert type(model).__name__ == name
    assert_equal_weights(model, saved)
    assert not model.training
    (tmp_path / "model.safetensors").unlink()
    assert type(open_model(f"hf:{tmp_path}", pretrained=False)).__name__ == name
    with torch.device("meta"):
        empty = open_model(f"hf:{tmp_path}", pretrained=False)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    with pytest.raises(ValueError, match="spec: expected a model with local or downl"):
        open_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_base", "spec: expected 'timm:NAME', .* got 'vit_base'"),
        ("timm:vit_bse", r"spec: expected a name of timm.list_models\(\), got 'vit_bse'"),
        ("timm:vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224", "; did you mean 'timm:vit_tiny_patch16_224'"),
        ("vit_small_patch14_dinov2.lvd142m", "'timm:vit_small_patch14_dinov2.lvd142m'"),
        ("vit_tiny_patch16_225", "; did you mean 'timm:vit_tiny_patch16_224'"),
        ("ViT-B-32", "; did you mean 'open_clip:ViT-B-32'"),
        ("open_clip:ViT-B-33", "did you mean 'ViT-B-32'"),
        ("elip_clip_vitb16", "; did you mean 'elip_clip_vit_b16'"),
        ("me/model@v1", "spec: expected a name on the hub without a revision, got 'me/model@v1'"),
        ("hf:/no/such/folder", "spec: expected a model with local .* got 'hf:/no/such/folder'"),
        ("clip_tiny", "no weights are published"),
    ],
)
def test_the_error_for_an_unknown_spec_names_the_expected_forms(spec, message):
    with pytest.raises(ValueError, match=message):
        open_model(spec)


def test_a_name_on_the_hub_needs_no_prefix_but_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_spec("hf:me/model") == split_spec("me/model") == ("hf", "me/model")
    for spec in ("clip_tiny", "./me/model", "me/model/", "a/b/c", "timm:", "other:me/model"):
        assert split_spec(spec) == (None, spec)
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert split_spec("me/model") == (None, "me/model")
