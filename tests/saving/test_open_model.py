"""Models by a text, with random weights and from local folders."""

import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
import transformers

import elip_models.pretraining.models
from elip_models.images import CLIP_MEAN, CLIP_STD
from elip_models.pretraining.models.clip.model import CLIP
from elip_models.pretraining.models.registry import CONFIGS
from elip_models.saving.open_model import open_model, split_spec
from elip_models.towers import as_reducible
from tests.helpers.models import hf_blip, hf_clip
from tests.helpers.own_warnings import NEW_PARTS, NO_IMAGE_STATS
from tests.helpers.weights import assert_equal_weights

NAMED = {
    "timm:vit_tiny_patch16_224": timm.models.VisionTransformer,
    "open_clip:ViT-B-32": open_clip.CLIP,
    "elip_clip_vit_s16": CLIP,
}
HALF = ([0.5, 0.5, 0.5], [0.4, 0.4, 0.4])
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


def tiny_clip():
    return CLIP(replace(CONFIGS["clip_tiny"], vision_depth=2, text_depth=1))


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


def test_a_folder_that_training_wrote(tmp_path):
    saved = tiny_clip()
    saved.save_pretrained(tmp_path)
    model = open_model(str(tmp_path))
    assert_equal_weights(model, saved)
    assert not model.training
    reduced = open_model(str(tmp_path), schedule="1(100%) 1(50%)")
    assert reduced.config.schedule == "1(100%) 1(50%)"
    assert_equal_weights(reduced, saved)


def image_stats(model):
    return as_reducible(model).image_stats()


@NEW_PARTS
@NO_IMAGE_STATS
def test_image_stats_are_those_of_the_model(tmp_path):
    with torch.device("meta"):
        augreg, ours, clip = (open_model(spec, pretrained=False) for spec in NAMED)
        assert image_stats(augreg) == ((0.5,) * 3, (0.5,) * 3)
        assert image_stats(ours) == image_stats(clip) == (CLIP_MEAN, CLIP_STD)
    tiny_vit().save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(image_mean=HALF[0], image_std=HALF[1])
    assert image_stats(open_model(f"hf:{tmp_path}"))[0][0] == 0.485
    processor.save_pretrained(tmp_path)
    assert image_stats(open_model(f"hf:{tmp_path}")) == tuple(map(tuple, HALF))
    assert image_stats(hf_clip()) == (CLIP_MEAN, CLIP_STD)


@NEW_PARTS
@pytest.mark.parametrize(
    "content", ["[]", '{"image_processor": []}', "[" * 100_000, '{"image_mean": 3, "image_std": 3}']
)
def test_a_processor_of_a_wrong_kind_is_an_error(content, tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    model = open_model(f"hf:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"preprocessor_config.json: expected|image_mean: expected"
    ):
        image_stats(model)


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


def test_a_folder_of_each_kind_opens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert type(open_model(str(tmp_path), pretrained=False)).__name__ == "ViTModel"
    small = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
    reduced = elip_models.reduce_(small, "tome", keep=0.6)
    elip_models.save_reduced(reduced, tmp_path / "reduced")
    opened = open_model(str(tmp_path / "reduced"))
    expected = elip_models.reduction_summary(reduced).strategy
    assert elip_models.reduction_summary(opened).strategy == expected
    with pytest.raises(ValueError, match=r"pretrained.: False}; open the dense model as") as raised:
        open_model(str(tmp_path / "reduced"), pretrained=False)
    form = str(raised.value).split("'")[-2]
    assert not elip_models.is_reduced(open_model(form, pretrained=False))
    elip_models.create_model("clip_tiny").save_pretrained(tmp_path / "run" / "model")
    assert type(open_model(str(tmp_path / "run"))).__name__ == "CLIP"


@pytest.mark.parametrize("value", [["clip"], {"a": 1}, 3, True])
@pytest.mark.parametrize("key", ["model", "model_type", "architecture"])
def test_a_name_of_another_type_in_a_config_is_an_error(key, value, tmp_path):
    saved = tiny_clip() if key == "model" else tiny_vit()
    saved.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    spec = str(tmp_path) if key == "model" else f"hf:{tmp_path}"
    with pytest.raises(ValueError, match=rf"config\.json: {key}: expected a (text|string), got "):
        open_model(spec)
