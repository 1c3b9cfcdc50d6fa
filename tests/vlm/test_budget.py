"""Budgets: how many image tokens stay in one call, of each image or of all of a prompt."""

import pytest
import torch

from elip_models import budget, reduce_, unreduce_
from tests.vlm import oracle
from tests.vlm.configs import IMAGE, VIDEO
from tests.vlm.models import build
from tests.vlm.test_question import selections


def kept_of_images(model, inputs):
    """Return how many tokens of each image stay, in the order of the prompts."""
    kept, ids = selections(model, inputs)[:, -1], inputs["input_ids"]
    numbers = []
    for row in range(len(ids)):
        runs, lengths = (ids[row] == IMAGE).unique_consecutive(return_counts=True)
        parts = kept[row].split(lengths.tolist())
        numbers += [int(part.sum()) for part, is_image in zip(parts, runs, strict=True) if is_image]
    return numbers


CASES = {
    "a number": (dict(keep=5), [5, 5, 5]),
    "a share": (dict(keep=1.0), [16, 16, 16]),
    "one for each image": (dict(keep=[4, 1.0, 3]), [4, 16, 3]),
    "a total": (dict(total=9), [9, 5, 4]),
    "a total above all tokens": (dict(total=99), [16, 16, 16]),
}


@pytest.mark.parametrize("strategy", ["diverse", "visionzip", "fastv:layer=1", "pyramid:stages=3"])
@pytest.mark.parametrize("case", CASES)
def test_a_budget_sets_how_many_tokens_stay_in_the_calls_inside(strategy, case):
    model, inputs = build("llava")
    settings, expected = CASES[case]
    before = kept_of_images(reduce_(model, strategy, keep=12), inputs)
    with budget(model, **settings):
        assert kept_of_images(model, inputs) == expected
    assert kept_of_images(model, inputs) == before == [12] * 3


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1"])
def test_generate_repeats_the_budget_of_each_image_for_its_beams(strategy):
    model, inputs = build("llava")
    reduce_(model, strategy, keep=0.5)
    for settings in (dict(keep=[3, 16, 5]), dict(total=12)):
        with budget(model, **settings):
            expected = selections(model, inputs).repeat_interleave(2, 0)
            output, kept = oracle.generate(model, inputs, num_beams=2)
        if strategy == "diverse":
            assert torch.equal(kept, expected[:, 0])
        assert output.sequences.shape[0] == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_video"])
def test_a_total_is_shared_in_proportion_to_the_tokens(name):
    model, inputs = build(name)
    reduce_(model)
    images = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
    for total in (9, 13):
        with budget(model, total=total):
            assert ((oracle.forward(model, inputs)[1] & images).sum(1) == total).all()


WRONG = {
    "none": ({}, "either `keep` or `total`, got keep=None and total=None"),
    "both": (dict(keep=4, total=4), "either `keep` or `total`"),
    "one token": (dict(keep=1), r"keep: expected a float in \(0, 1\].* got 1, one token"),
    "a wrong share": (dict(keep=[4, 1.5]), r"keep: expected a float in \(0, 1\].* got 1.5"),
    "no total": (dict(total=0), "total: expected an integer at least 1, got 0"),
    "no number": (dict(keep=[]), "for each of the 3 images of the batch, got 0"),
    "another number": (dict(keep=[4, 4]), "for each of the 3 images of the batch, got 2"),
    "too little": (dict(total=1), "total: expected at least 2, a token for each image"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_budget_is_refused_with_the_requirement(wrong):
    model, inputs = build("llava")
    settings, message = WRONG[wrong]
    with pytest.raises(ValueError, match="call reduce_ with such a strategy first"):
        budget(model, 4).__enter__()
    reduce_(model)
    with pytest.raises(ValueError, match=message), budget(model, **settings):
        model(**inputs)
    unreduce_(model)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1"])
def test_a_list_for_other_prompts_than_those_of_the_batch_is_refused(strategy):
    model, inputs = build("llava", rows=((4, "image", 3), (2, "image", 3), (2, "image", 3)))
    reduce_(model, strategy, keep=0.5)
    with budget(model, [4]), pytest.raises(ValueError, match=r"each of the 3 images.* got 1"):
        model(**inputs)
