"""Arguments of reduce_ for a multimodal language model, and what a model tells of its reduction."""

import pytest
import torch
import transformers as hf
from transformers import AutoModelForImageTextToText

from elip_models import (
    budget,
    create_model,
    guidance,
    is_reduced,
    list_strategies,
    record_stages,
    reduce_,
    reduction_summary,
    unreduce_,
)
from elip_models.vlm.families import FAMILIES
from elip_models.vlm.strategies.controls import Stride
from tests.helpers.own_warnings import UNGUIDED
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
    "[]": r"strategy: expected one of a language model .* got \[\]",
    "{}": r"strategy: expected one of a language model .* got {}",
    "0.5": r"strategy: .* got 0\.5; pass keep=0\.5, the share of the tokens that stay",
}


@pytest.mark.parametrize("strategy", WRONG)
def test_a_wrong_strategy_is_refused_with_its_name(llava, strategy):
    value = {"[]": [], "{}": {}, "0.5": 0.5}.get(strategy, strategy)
    with pytest.raises((TypeError, ValueError), match=WRONG[strategy]):
        reduce_(llava, value)
    assert not is_reduced(llava)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1}, r"keep: .* got 1, one token; pass 1\.0 for all of them"),
        ({"keep_rate": 0.7}, r"got 0\.7; pass keep=0\.7, the share of the tokens that stay"),
        ({"num_keep": 64}, "got 64; pass keep=64$"),
        ({"method": "fastv"}, "pass strategy='fastv'$"),
        ({"r": 8}, "Pass strategy='tome', or keep in its place$"),
    ],
)
def test_an_argument_of_other_libraries_leads_to_that_of_reduce_(llava, options, message):
    with pytest.raises(ValueError, match=message):
        reduce_(llava, **options)
    assert not is_reduced(llava)


def test_a_family_without_a_row_is_refused_by_name_and_not_reduced_by_half(monkeypatch, tmp_path):
    model = build("llava")[0]
    monkeypatch.delitem(FAMILIES, "llava")
    message = "got a Llava.*, of 'llava': it is not compared .* 'tome' and others reduce its image"
    for strategy in (None, "diverse", Stride()):
        with pytest.raises(TypeError, match=message):
            reduce_(model, strategy)
        assert not is_reduced(model)
    reasons = {entry.name: entry.why_unsupported for entry in list_strategies(model)}
    with pytest.raises(TypeError, match="'diverse' acts, got a LlamaModel; pass the whole model"):
        reduce_(model.model.language_model, "diverse")
    assert reasons["merge"] is None and "not of 'llava'" in reasons["fastv"]
    reduce_(model, "tome").save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert reduction_summary(reduce_(loaded)).strategy.name == "tome"


@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1"])
def test_a_mask_without_a_column_for_each_token_is_refused(llava, strategy):
    inputs = build("llava")[1]
    inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
    width = inputs["input_ids"].shape[1]
    with pytest.raises(
        ValueError, match=f"attention_mask: expected {width} columns, .* {width - 1};"
    ):
        reduce_(llava, strategy)(**inputs)


def test_the_default_and_the_summary(llava, monkeypatch):
    reduce_(llava)
    summary = reduction_summary(llava)
    assert summary.strategy.name == "diverse" and summary.keep == 0.5
    monkeypatch.setattr(llava.config, "image_seq_length", 7)  # no model reads it
    assert str(reduction_summary(llava)) == str(summary)
    assert "8 of 16 in an image of 32 x 32 pixels" in str(summary)
    assert summary.cache_bytes * 2 == summary.dense_cache_bytes
    assert 0.4 < summary.prefill_flops < 0.6
    assert "(reduced) image tokens: diverse(keep=0.5" in repr(llava)
    unreduce_(llava)
    assert str(reduction_summary(reduce_(llava, "tome"))).startswith("image tower       tome: ")
    unreduce_(llava)
    dense = reduction_summary(llava)
    assert dense.strategy is None and dense.prefill_flops == 1
    assert "reads every image token" in str(dense)


@pytest.mark.parametrize("strategy", ["diverse:keep=0.25", Stride(), "fastv"])
@pytest.mark.parametrize(
    "make", [plain_vit, lambda: create_model("elip_clip_tiny")], ids=["timm", "own"]
)
def test_an_image_model_refuses_a_strategy_of_language_models_with_its_place(make, strategy):
    with pytest.raises(TypeError, match=r"multimodal language model, in which '\w+' acts, got a "):
        reduce_(make(), strategy)


def test_an_unsupported_family_is_refused_with_its_reason():
    with torch.device("meta"):
        model = hf.Blip2ForConditionalGeneration(hf.Blip2Config())
    with pytest.raises(TypeError, match="got a Blip2ForConditionalGeneration: it has a Q-Former"):
        reduce_(model, "diverse")


def test_guidance_of_a_language_model_needs_a_reduced_tower(llava):
    text_cls = torch.randn(1, 32)
    reduce_(llava)
    message = "with 'diverse', which acts on the language model and reads the question"
    with pytest.raises(ValueError, match=message), guidance(llava, text_cls):
        pass
    reduce_(llava, "elip", keep=0.7)
    with guidance(llava, text_cls):
        pass


@UNGUIDED
@pytest.mark.parametrize("strategy", ["stride", "fastv:layer=1"])
def test_no_other_strategy_inside_a_context(llava, strategy):
    reduce_(llava, "diverse")
    question = torch.ones(1, 9, dtype=torch.bool)
    for context in (record_stages(llava), budget(llava, 4), guidance(llava, question=question)):
        with context, pytest.raises(RuntimeError, match="expected a call outside of guidance"):
            reduce_(llava, strategy, keep=0.5)
