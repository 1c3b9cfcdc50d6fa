"""CLIP: both towers, the loss, and errors of loading."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import elip_models
from elip_models.pretraining.models.clip.model import CLIP
from tests.helpers.own_warnings import SLOW_SCORER

TINY = {
    "image_size": 32,
    "vision_width": 24,
    "vision_heads": 2,
    "text_width": 16,
    "text_heads": 2,
    "text_depth": 1,
    "vocab_size": 64,
    "context_length": 8,
    "embed_dim": 12,
}


def tiny(name="elip_clip_tiny", **overrides):
    return elip_models.create_model(name, **(TINY | overrides))


def batch(B=4):
    input_ids = torch.randint(3, 64, (B, 8))
    input_ids[:, 5] = 2
    mask = torch.ones_like(input_ids)
    mask[:, 6:] = 0
    return {"images": torch.randn(B, 3, 32, 32), "input_ids": input_ids, "attention_mask": mask}


def test_text_guides_the_image_tower_through_the_transposed_projection():
    model, inputs = tiny(fusion=0.3), batch()
    out = model(**inputs)
    text = F.normalize(model.encode_text(inputs["input_ids"], inputs["attention_mask"]), dim=-1)
    tokens = elip_models.encode_image(
        model.visual,
        inputs["images"],
        text @ model.image_projection.weight,
        schedule="2(100%) 2(90%) 6(65%) 2(40%)",
        scorer="exact",
        fusion=0.3,
    )
    assert tokens.shape[1] == 6 + 2
    features = F.normalize(tokens[:, 0] @ model.image_projection.weight.T, dim=-1)
    torch.testing.assert_close(out.image_features, features)
    torch.testing.assert_close(out.text_features, text)


@pytest.mark.parametrize("name", ["clip_tiny", "elip_clip_tiny"])
def test_sigmoid_loss_is_binary_for_each_image_and_text(name):
    model = tiny(name, loss="sigmoid")
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10
    out = model(**batch())
    scores = 10 * out.image_features @ out.text_features.T - 10
    expected = 0.0
    for i in range(4):
        for j in range(4):
            probability = scores[i, j].double().sigmoid()
            expected -= (probability if i == j else 1 - probability).log() / 4
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)  # fp32 against fp64


@SLOW_SCORER
def test_images_without_text_are_dense_by_default():
    model, x = tiny().eval(), torch.randn(2, 3, 32, 32)
    reduction, model.reduction = model.reduction, model.dense
    dense = model.encode_image(x)
    model.reduction = reduction
    with pytest.warns(UserWarning, match="nothing is reduced"):
        elip_models.user_warnings.warn_again()
        assert torch.equal(model.encode_image(x), dense)
    vision = CLIP(dataclasses.replace(model.config, without_text="vision")).eval()
    vision.load_state_dict(model.state_dict())
    assert not torch.equal(vision.encode_image(x), dense)


@pytest.mark.parametrize("name", ["clip_vit_s16", "clip_vit_b16"])
def test_the_papers_models_have_the_papers_sizes(name):
    with torch.device("meta"):
        model = elip_models.create_model(f"elip_{name}")
    width, heads = {"clip_vit_s16": (384, 6), "clip_vit_b16": (768, 12)}[name]
    assert model.visual.embed_dim == width
    assert model.visual.blocks[0].attn.num_heads == heads
    assert model.tower.num_patches == 196
    assert model.config.reduction.schedule.keep_counts(196) == [176, 127, 78]


def test_a_load_error_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        CLIP.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        CLIP.from_pretrained(tmp_path)
    tiny(embed_dim=8).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"embed_dim": 8', '"embed_dim": 12'))
    with pytest.raises(ValueError, match="weights that fit"):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"strategy": "tomee"}, "did you mean 'tome'"),
        ({"strategy": "tome:r"}, "expected settings key=value"),
        ({"strategy": "tome:r=2", "strategy_options": {"r": 2}}, "r: expected it once"),
        ({"strategy_options": {"r": 2}}, "strategy_options: expected None"),
        ({"strategy": "elip:scorer=last"}, "strategy_options: expected None"),
        ({"strategy": "random", "strategy_options": {"r": 2}}, "r: expected none"),
        ({"strategy": "random", "merge": "nearest"}, "set strategy='random:merge=nearest'"),
        ({"strategy": "guided_tome", "fusion": 0.5}, "fusion: expected strategy='elip'"),
    ],
)
def test_a_bad_strategy_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_loss_is_symmetric_cross_entropy():
    out = tiny()(**batch())
    logits = out.image_features @ out.text_features.T / 0.07
    labels = torch.arange(4)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(out.loss, expected)
