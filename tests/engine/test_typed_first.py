"""The first calls of a user: a model and at most one number."""

import copy
import threading

import pytest
import timm
import torch

import elip_models
from tests.helpers.models import (
    PAIRS,
    hf_clip,
    ids,
    open_clip_pair,
    output_of_guided_pair,
    output_of_pair,
)
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import images, plain_vit


def vit(depth=12, **options):
    return timm.create_model(
        "vit_base_patch16_224", depth=depth, embed_dim=32, num_heads=2, num_classes=3, **options
    ).eval()


@pytest.mark.parametrize("depth", [1, 2, 3, 12, 24])
def test_no_argument_means_merge_at_any_depth(depth):
    model, x = vit(depth), torch.randn(1, 3, 224, 224)
    elip_models.reduce_(model)
    summary = elip_models.reduction_summary(model)
    assert summary.strategy.name == "merge"
    assert summary.keep == pytest.approx(0.7 if depth > 1 else 0.75, abs=2 / 197)
    assert model(x).shape == (1, 3)
    elip_models.reduce_(model, keep=0.8)
    assert elip_models.reduction_summary(model).keep == pytest.approx(0.8, abs=2 / 197)


def test_a_summary_is_read_by_a_person():
    model = vit()
    assert str(elip_models.reduction_summary(model)) == "dense: 12×197 tokens, not reduced"
    assert not elip_models.is_reduced(model)
    before = repr(model)
    elip_models.reduce_(model, schedule="clip")
    said = str(elip_models.reduction_summary(model))
    for part in (
        "elip(schedule='2(100%) 2(90%) 6(65%) 2(40%)'",
        "2×197 2×178 6×129 2×80",
        " of dense in inference",
        "image alone",
    ):
        assert part in said
    assert "(reduced) elip: 2×197 2×178 6×129 2×80 tokens, 0." in repr(model)
    assert elip_models.is_reduced(model)
    assert repr(copy.deepcopy(model)) == repr(model)
    assert repr(elip_models.unreduce_(model)) == before
    merge = elip_models.reduction_summary(elip_models.reduce_(model))
    assert "197 188 .. 88, 78 after the last\n" in str(merge)


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_the_summary_of_a_whole_model_names_its_own_text_and_its_image_tower(make):
    model = make()
    assert "tokens in the image tower, not reduced" in str(elip_models.reduction_summary(model))
    elip_models.reduce_(model, strategy="elip")
    assert "its own text" in elip_models.reduction_summary(model).guided_by
    assert repr(model).count("(reduced) image tower: elip: ") == 1
    assert "of the image tower; the rest" in str(elip_models.reduction_summary(model))


def test_a_record_has_the_stages_of_the_forwards_inside():
    model, x = plain_vit(), images()
    with pytest.raises(ValueError, match="expected one that reduce_ has changed"):
        elip_models.record_stages(model).__enter__()
    elip_models.reduce_(model, schedule="2(100%) 2(60%) 2(40%)")
    with elip_models.record_stages(model) as infos:
        model(x)
        model(x)
        other = threading.Thread(target=model, args=(x,))
        other.start()
        other.join()
    model(x)
    assert [info.stage.first for info in infos] == [2, 4, 2, 4]
    assert infos[0].reduction.kept.shape == (len(x), infos[0].stage.keep)
    with pytest.raises(TypeError, match="compiled"):
        elip_models.record_stages(torch.compile(model)).__enter__()


@UNGUIDED
@pytest.mark.parametrize("make", [hf_clip, open_clip_pair])
def test_prompts_and_images_of_different_numbers(make):
    """With K prompts and B images, the image alone guides; also with K = B."""
    model, x = make().eval(), images(2)
    elip_models.reduce_(model, strategy="elip", keep=0.6, fusion=0.5)
    three = output_of_pair(model, x, ids(3))
    unguided = elip_models.unreduce_(copy.deepcopy(model))
    elip_models.reduce_(unguided, strategy="elip", keep=0.6, fusion=1.0)
    assert torch.equal(three, output_of_pair(unguided, x, ids(3)))
    assert torch.equal(output_of_pair(model, x, ids(2)), output_of_pair(unguided, x, ids(2)))
    assert not torch.equal(output_of_guided_pair(model, x, ids(2)), three)


@UNGUIDED
@pytest.mark.parametrize("make", [hf_clip, open_clip_pair])
def test_one_text_guides_all_images(make):
    model, x, one = make().eval(), images(2), ids(1)
    elip_models.reduce_(model, strategy="elip", keep=0.6, fusion=0.2)
    guided = output_of_guided_pair(model, x, one)
    torch.testing.assert_close(guided, output_of_guided_pair(model, x, one.expand(2, -1)))
    assert not torch.allclose(guided, output_of_pair(model, x, ids(3)))
