"""Arguments of reduce_ for a multimodal language model, and what a model tells of its reduction."""

import pytest
import torch

from elip_models import (
    create_model,
    guidance,
    is_reduced,
    reduce_,
    reduction_summary,
    unreduce_,
)
from elip_models.vlm.strategies.controls import Stride
from elip_models.vlm.strategies.diverse import Diverse
from tests.helpers.towers import plain_vit
from tests.vlm.models import build


@pytest.fixture(scope="module")
def llava():
    return build("llava")[0]


@pytest.fixture(autouse=True)
def _restored(llava):
    yield
    unreduce_(llava)


WRONG = {
    "divers": r"strategy: expected one of a language model .*did you mean 'diverse'",
    "tomee": r"strategy: expected one of .* image tower .*did you mean 'tome'",
    "diverse:relevanc=true": "expected a setting of 'diverse'.*did you mean 'relevance'",
    "stride:keep=1": r"keep: expected .* got 1, one token; pass 1\.0 for all of them",
}


@pytest.mark.parametrize("strategy", WRONG)
def test_a_wrong_strategy_is_refused_with_its_name(llava, strategy):
    with pytest.raises((TypeError, ValueError), match=WRONG[strategy]):
        reduce_(llava, strategy)
    assert not is_reduced(llava)


def test_settings_may_be_keywords(llava):
    reduce_(llava, "diverse", relevance=True, keep=0.25)
    assert reduction_summary(llava).strategy == Diverse(keep=0.25, relevance=True)
    with pytest.raises(ValueError, match="r: expected none with strategy='diverse'"):
        reduce_(llava, "diverse", r=3)
    with pytest.raises(ValueError, match="relevance: expected it inside the instance"):
        reduce_(llava, Stride(), relevance=True)
    assert reduction_summary(llava).strategy == Diverse(keep=0.25, relevance=True)


def test_the_default_and_the_summary(llava):
    reduce_(llava)
    summary = reduction_summary(llava)
    assert summary.strategy.name == "diverse" and summary.keep == 0.5
    assert summary.cache_bytes * 2 == summary.dense_cache_bytes
    assert 0.4 < summary.prefill_flops < 0.6
    assert "(reduced) image tokens: diverse(keep=0.5" in repr(llava)
    unreduce_(llava)
    dense = reduction_summary(llava)
    assert dense.strategy is None and dense.prefill_flops == 1
    assert "reads every image token" in str(dense)


def test_a_model_prints_the_reductions_of_both_parts():
    model = build("llava")[0]
    core, dense = model.model, repr(model)
    for strategies in (("tome", "diverse", "fastv:layer=1"), ("diverse", "tome")):
        for strategy in strategies:
            reduce_(core, strategy)
        assert "(reduced) image tower: tome" in repr(core)
        assert "(reduced) image tokens: diverse(keep=0.5" in repr(core)
        unreduce_(core)
        assert repr(model) == dense


@pytest.mark.parametrize("strategy", ["diverse:keep=0.25", Stride(), "fastv"])
@pytest.mark.parametrize(
    "make", [plain_vit, lambda: create_model("elip_clip_tiny")], ids=["timm", "own"]
)
def test_an_image_model_refuses_a_strategy_of_language_models_with_its_place(make, strategy):
    with pytest.raises(TypeError, match=r"multimodal language model, in which '\w+' acts, got a "):
        reduce_(make(), strategy)


def test_guidance_of_a_language_model_needs_a_reduced_tower(llava):
    text_cls = torch.randn(1, 32)
    reduce_(llava)
    message = "with 'diverse', which acts on the language model and reads the question"
    with pytest.raises(ValueError, match=message), guidance(llava, text_cls):
        pass
    reduce_(llava, "elip", keep=0.7)
    with guidance(llava, text_cls):
        pass
