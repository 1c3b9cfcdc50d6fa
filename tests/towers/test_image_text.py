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
from tests.helpers.models import PAIRS, hf_blip, hf_clip, hf_siglip, ids, open_clip_pair
from tests.helpers.models import output_of_pair as run
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
    got = run(model, x, tokens)
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
    assert trained() == expected


@pytest.mark.parametrize(("make", "further"), [(hf_clip, ()), (hf_siglip, ()), (hf_blip, (True,))])
def test_a_mask_counts_by_position_and_by_name(make, further):
    model, x, tokens = make().eval(), images(), ids()
    mask = torch.ones_like(tokens)
    mask[:, 4:7] = 0
    pair = as_image_text(model)
    by_name = pair.text_cls(tokens, x, attention_mask=mask)
    assert torch.equal(pair.text_cls(tokens, x, *further, mask), by_name)
    assert not torch.allclose(pair.text_cls(tokens, x), by_name)


def test_given_guidance_comes_before_the_models_own(model):
    x, tokens = images(), ids()
    elip_models.reduce_(model, schedule=SCHEDULE, fusion=0.0)
    own = run(model, x, tokens)
    with elip_models.guidance(model, guidance_of(model, tokens)):
        assert torch.equal(run(model, x, tokens), own)
    text = torch.randn(2, WIDTH)
    with elip_models.guidance(model, text):
        given = run(model, x, tokens)
    assert torch.equal(run(model, x, tokens), own)
    assert not torch.equal(given, own)


def hooked(model):
    return any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_undoing_the_image_model_undoes_the_whole_model():
    model, x, tokens = open_clip_pair().eval(), images(), ids(2)
    dense = model(x, tokens)["image_features"]
    elip_models.reduce_(model, schedule=SCHEDULE)
    elip_models.unreduce_(model.visual)
    assert not hooked(model)
    assert "forward_intermediates" not in vars(model)
    assert torch.equal(model(x, tokens)["image_features"], dense)
