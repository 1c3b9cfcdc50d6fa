"""Models of transformers that read the tokens of a reduced image tower."""

import pytest
import torch
import transformers

import elip_models
from elip_models import reduce_
from tests.helpers.models import HF, HF_TEXT, dinov2, hf_vision
from tests.helpers.towers import SCHEDULE, images

MERGING = {
    "elip": {"strategy": "elip", "schedule": SCHEDULE},
    "evit": {"strategy": "evit"},
    "tome": {"strategy": "tome:r=4"},
}
DROPPING = {
    "elip": {"schedule": SCHEDULE, "merge": "none"},
    "patch_dropout": {"strategy": "patch_dropout"},
    "resize": {"strategy": "resize:size=32"},
}
IMAGE_TOKEN = 49
LANGUAGE = HF_TEXT | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}


def language_model(family, vision, **options):
    """Return a tiny language model that reads 36 patches of an image in place of text tokens."""
    vision = getattr(transformers, f"{vision}VisionConfig")(**HF)
    text = (transformers.LlamaConfig if family == "Llava" else transformers.GemmaConfig)(**LANGUAGE)
    name, options = f"{family}Config", {"image_token_index": IMAGE_TOKEN} | options
    config = getattr(transformers, name)(vision_config=vision, text_config=text, **options)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def llava(vision):
    strategy = "full" if vision == "Siglip" else "default"  # the patches, CLS aside
    return language_model("Llava", vision, vision_feature_select_strategy=strategy)


def paligemma():
    return language_model("PaliGemma", "Siglip", projection_dim=32)


def logits_of(model, x, **options):
    """Return the logits of a language model for two images and three words each."""
    text = torch.full((2, 39), IMAGE_TOKEN)
    text[:, 36:] = 7
    return model(
        input_ids=text, attention_mask=torch.ones_like(text), pixel_values=x, **options
    ).logits


def masked_modeling(family):
    model = hf_vision(f"{family}ForMaskedImageModeling", f"{family}Config", encoder_stride=8)
    return model.eval()


STAGES = ["stage1", "stage2", "stage4", "stage6"]


def backbone():
    return dinov2("Dinov2Backbone", out_features=STAGES, apply_layernorm=False).eval()


@pytest.mark.parametrize("strategy", MERGING)
def test_the_feature_maps_of_a_backbone_are_whole_grids(strategy):
    model, x, settings = backbone(), images(), MERGING[strategy]
    dense = model(x).feature_maps
    expected = reduce_(dinov2_like(model), **settings)(x, output_hidden_states=True).hidden_states
    found = reduce_(model, **settings)(x)
    assert found.hidden_states is None
    for stage, feature_map in zip(STAGES, found.feature_maps, strict=True):
        patches = expected[int(stage.removeprefix("stage"))][:, 1:]
        assert torch.equal(feature_map, patches.mT.unflatten(2, (6, 6)))
    assert not torch.equal(found.feature_maps[-1], dense[-1])
    again = elip_models.unreduce_(model)(x).feature_maps
    assert all(torch.equal(a, b) for a, b in zip(again, dense, strict=True))


def dinov2_like(model):
    """Return the Dinov2Model with the weights of a backbone."""
    other = dinov2()
    other.load_state_dict(model.state_dict())
    return other.eval()


NEEDING = {"ViT": lambda: masked_modeling("ViT"), "PaliGemma": paligemma, "backbone": backbone}


@pytest.mark.parametrize("settings", DROPPING.values(), ids=DROPPING)
@pytest.mark.parametrize("make", NEEDING.values(), ids=NEEDING)
def test_a_model_that_needs_every_patch_refuses_dropping(make, settings):
    model = make()
    with pytest.raises(TypeError, match=r"at its position|a (token|position) for each patch"):
        reduce_(model, **settings)
    assert not elip_models.is_reduced(model)
    reduce_(model, strategy="patch_dropout:keep_ratio=1.0")  # drops none


@pytest.mark.parametrize("vision", ["CLIP", "Siglip"])
@pytest.mark.parametrize("settings", [{"strategy": "tome:r=4"}, {"strategy": "patch_dropout"}])
def test_a_language_model_that_reads_hidden_states_has_whole_grids(vision, settings):
    model, x = llava(vision), images()
    dense = logits_of(model, x)
    reduce_(model, **settings)
    assert "(reduced) image tower: " in repr(model)
    model.train()
    assert logits_of(model, x).shape == dense.shape
    model.eval()
    assert logits_of(model, x).shape == dense.shape
    assert torch.equal(logits_of(elip_models.unreduce_(model), x), dense)
    with pytest.raises(TypeError, match="a token for each patch"):
        reduce_(model, strategy="resize:size=32")
