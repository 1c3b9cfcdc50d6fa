"""Whole language-image models: reduce_ encodes the text first, and their own forward stays."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers

import elip_models
from elip_models.api import is_reduced
from elip_models.towers import as_image_text
from tests.helpers.models import PAIRS, hf_blip, hf_clip, hf_siglip, ids
from tests.helpers.models import output_of_guided_pair as guided
from tests.helpers.models import output_of_pair as run
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import SCHEDULE, WIDTH, gradients, images


def guidance_of(model, tokens):
    """Return the guidance, computed with the library's own functions."""
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            text = F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)
            return text @ model.visual_projection.weight
        if isinstance(model, transformers.SiglipModel):
            return model.get_text_features(tokens).pooler_output
        if isinstance(model, transformers.BlipForImageTextRetrieval):
            return model.text_encoder(tokens).last_hidden_state[:, 0]
        text = model.encode_text(tokens, normalize=True)
        if not isinstance(model.visual, open_clip.timm_model.TimmModel):
            return text @ model.visual.proj.T
        layers = (model.visual.trunk.head, *model.visual.head)
        linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        return text @ linear[0].weight if linear else text


def image_model(model):
    return model.visual if hasattr(model, "visual") else model.vision_model


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def model(request):
    return request.param().eval()


def test_text_guides_the_image_tower(model):
    x, tokens = images(), ids()
    dense, keys = run(model, x, tokens), list(model.state_dict())
    text = guidance_of(model, tokens)
    bare = copy.deepcopy(model)
    elip_models.reduce_(image_model(bare), schedule=SCHEDULE, scorer="exact")
    with elip_models.guidance(image_model(bare), text):
        expected = run(bare, x, tokens)
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")
    got = guided(model, x, tokens)
    assert torch.equal(got, expected)
    assert not torch.allclose(got, dense)
    assert list(model.state_dict()) == keys
    got.square().sum().backward()
    elip_models.unreduce_(model)
    assert torch.equal(run(model, x, tokens), dense)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not is_reduced(model)


def test_under_autocast_the_text_that_guides_trains_too(model):
    """The guidance runs the text tower without gradient, on weights that training casts as well."""
    x, tokens = images(), ids()
    arguments = (x, tokens) if hasattr(model, "visual") else ()
    named = {} if arguments else {"input_ids": tokens, "pixel_values": x}

    def trained():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(*arguments, **named).values()
        learned = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
        sum(t.float().square().sum() for t in learned).backward()
        return gradients(model).keys()

    expected = trained()
    elip_models.reduce_(model, schedule=SCHEDULE)
    with elip_models.guidance(model, paired=True):
        assert trained() == expected


def test_given_guidance_comes_before_the_models_own(model):
    x, tokens = images(), ids()
    elip_models.reduce_(model, schedule=SCHEDULE, fusion=0.0)
    own = guided(model, x, tokens)
    with elip_models.guidance(model, guidance_of(model, tokens)):
        assert torch.equal(run(model, x, tokens), own)
    text = torch.randn(2, WIDTH)
    with elip_models.guidance(model, text):
        given = run(model, x, tokens)
    with elip_models.guidance(model, paired=True), elip_models.guidance(model, text):
        assert torch.equal(run(model, x, tokens), given)
    assert torch.equal(guided(model, x, tokens), own)
    assert not torch.equal(given, own)


def outputs(model, x, tokens):
    """Return what a call gives in which texts are compared with all images, image by image."""
    if hasattr(model, "visual"):
        return model(x, tokens)["image_features"]
    named = {"input_ids": tokens, "pixel_values": x}
    if isinstance(model, transformers.BlipForImageTextRetrieval):
        return model(**named, use_itm_head=False).itm_score
    return model(**named).logits_per_image


def test_other_numbers_raise_if_pairs_are_asked_for(model):
    elip_models.reduce_(model, "elip", keep=0.6)
    match = "texts: expected one for each image, or one for all, .* got 3 texts and 2 images"
    with elip_models.guidance(model, paired=True), pytest.raises(ValueError, match=match):
        outputs(model, images(2), ids(3))


@UNGUIDED
@pytest.mark.parametrize(
    ("make", "asks", "otherwise"),
    [
        (hf_clip, {"return_loss": True}, {"return_loss": False}),
        (hf_siglip, {"return_loss": True}, {}),
        (hf_blip, {}, {"use_itm_head": False}),
        (hf_blip, {"use_itm_head": True}, {"use_itm_head": False}),
    ],
)
def test_a_call_that_is_about_pairs_guides_them(make, asks, otherwise):
    model, x, tokens = make().eval(), images(), ids()
    elip_models.reduce_(model, "elip", keep=0.6, fusion=0.2)

    def kept(**options):
        with elip_models.record_stages(model) as infos:
            model(input_ids=tokens, pixel_values=x, **options)
        return [info.reduction.kept.tolist() for info in infos]

    with elip_models.guidance(model, paired=True):
        guided = kept(**otherwise)
    assert guided and kept(**asks) == guided != kept(**otherwise)
    pair = as_image_text(model)
    (value,) = (asks or {"use_itm_head": True}).values()
    position = (None, None, value) if make is not hf_blip else (value,)
    assert pair.pairs(tokens, x, *position) and not pair.pairs(tokens, x, **otherwise)


def test_as_many_prompts_as_images_are_no_pairs(model):
    """Zero-shot classification: an image has the same scores in every batch."""
    elip_models.reduce_(model, "elip", keep=0.6, fusion=0.2)
    x, prompts = images(4), ids(4)
    alone = [outputs(model, x[:n], prompts)[:1] for n in range(1, 5)]
    for scores in alone[1:]:
        torch.testing.assert_close(scores, alone[0])
    one = outputs(model, x, prompts[:1])[:1]
    torch.testing.assert_close(one, alone[0][:, : one.shape[1]])
    with elip_models.guidance(model, paired=True):
        assert not torch.allclose(outputs(model, x, prompts)[:1], alone[0])
