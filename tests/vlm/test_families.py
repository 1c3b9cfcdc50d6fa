"""Each family computes what the stock model computes without the columns of removed tokens."""

import pytest
import torch

from elip_models import is_reduced, reduce_, unreduce_
from elip_models.vlm.families import LANGUAGE_MODEL
from tests.vlm import oracle
from tests.vlm.configs import CASES, CONFIGS, IMAGE, VIDEO, attentions
from tests.vlm.models import build

QUICK = {"llava", "llava_next", "idefics3", "gemma3", "paligemma", "qwen2_5_vl_video", "qwen3_vl"}
QUICK |= {"gemma4", "lfm2_vl"}


def _families():
    """Return the name of every case with its first attention; most are slow."""
    for name in CASES:
        first = attentions(name)[0]
        is_quick = name in QUICK or first == "eager"
        yield pytest.param((name, first), marks=[] if is_quick else pytest.mark.slow)


OTHERS = [(name, attention) for name in CASES for attention in attentions(name)[1:]]


@pytest.fixture(scope="module", params=list(_families()), ids="-".join)
def built(request):
    return build(*request.param)


@pytest.fixture
def case(built):
    """Return a model and its inputs, and restore the model after the test."""
    yield built
    unreduce_(built[0])


def test_every_family_of_the_table_has_a_model():
    assert {config().model_type for config in CONFIGS.values()} == set(LANGUAGE_MODEL)


def test_keeping_every_token_changes_nothing(case):
    oracle.assert_unchanged_with_every_token(*case)


def test_logits_are_those_of_the_model_without_removed_columns(case):
    _assert_logits(*case, "diverse")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), OTHERS)
def test_so_are_those_of_another_attention_and_another_strategy(name, attention):
    _assert_logits(*build(name, attention), "stride")


@torch.no_grad()
def _assert_logits(model, inputs, strategy):
    dense = model(**inputs).logits
    reduce_(model, strategy=strategy, keep=0.5)
    expected, kept = oracle.assert_as_without_removed(model, inputs)
    read = kept & inputs["attention_mask"].bool()
    assert (dense - expected)[read].abs().max() > 1e-2  # or the oracle would show nothing
    assert torch.equal(model(**inputs).logits, dense)
    _assert_half(kept, inputs["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_a_prompt_without_padding_keeps_the_masks_of_its_images(name):
    model, inputs = build(name, rows=((2, "image", 1, "image", 1, "image", 6),))
    reduce_(model, keep=0.5)
    oracle.assert_as_without_removed(model, inputs)


def _assert_half(kept, ids):
    """Each row keeps text, the last token of each image, and about half of the others."""
    images = torch.isin(ids, torch.tensor([IMAGE, VIDEO]))
    assert kept[~images].all()
    assert kept[:, :-1][images[:, :-1] & ~images[:, 1:]].all()
    share = (kept & images).sum(1) / images.sum(1)
    assert ((share > 0.4) & (share < 0.6)).all()


def test_unreduce_leaves_no_hook(case):
    model, _ = case
    before = [_hooks(module) for module in model.modules()]
    reduce_(reduce_(model, keep=0.5), keep=0.25)
    assert [_hooks(module) for module in model.modules()] != before
    unreduce_(model)
    assert [_hooks(module) for module in model.modules()] == before
    assert not is_reduced(model)


def _hooks(module):
    return len(module._forward_hooks), len(module._forward_pre_hooks), set(vars(module))
