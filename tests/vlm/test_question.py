"""The question by which strategies select: never the answer, never padding, once for a prompt."""

from itertools import product

import pytest
import torch

from elip_models import guidance, record_stages, reduce_, unreduce_
from elip_models.vlm.families import find_multimodal
from elip_models.vlm.install import language_strategy
from tests.helpers.tiers import slow_except
from tests.vlm import oracle
from tests.vlm.configs import EAGER, IMAGE
from tests.vlm.models import build, one_row

SLOW = ("gemma3", "llama4", "llava_next", "lfm2_vl", "qwen2_5_vl_video", "llava_pixtral")
"""Windows, chunks, tiles, recurrent layers, positions of three axes with clips, and lines."""
FAMILIES = slow_except(("llava", "paligemma"), ("llava", "paligemma", *SLOW))
GUIDED = ("diverse:relevance=true", "cdpruner", "fastv:layer=2", "pyramid:stages=2")
FRONT = (None, "evs", "stride")
BY_SIMILARITY = ("diverse:relevance=true", "cdpruner")
OF_PATCHES = ("pool", "visionzip")
"""Strategies for images whose tokens are a square of patches."""
INSIDE = (None, "fastv:layer=2", "pyramid:stages=2")


def built(name, rows=None):
    model, inputs = build(name, "eager" if name in EAGER else "sdpa", rows)
    torch.nn.init.normal_(model.get_input_embeddings().weight[0], std=3.0)  # of padding
    return model, inputs


@torch.no_grad()
def selections(model, inputs):
    """Return the tokens (B, N) that stay before the language model, and behind each drop."""
    with record_stages(model) as infos:
        model(**inputs)
    return torch.stack((infos[0].kept, *infos[0].kept_behind), 1)


def why_unsupported(model, strategy):
    return language_strategy(strategy, {}).why_unsupported(find_multimodal(model))


def pairs(name, model):
    """Return each pair of a strategy before the language model and one inside it."""
    front = FRONT + (OF_PATCHES if name == "llava" else ()) + BY_SIMILARITY
    both = ([strategy for strategy in pair if strategy] for pair in product(front, INSIDE))
    return [pair for pair in both if not any(why_unsupported(model, one) for one in pair)]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_padded_batch_select_what_they_select_alone(name):
    model, inputs = built(name)
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    assert any(padding)
    for pair in pairs(name, model)[1:]:
        for strategy in pair:
            keep = 0.2 if strategy == "cdpruner" else 0.5  # fewer tokens than dimensions
            reduce_(model, strategy, keep=keep)
        batch = selections(model, inputs)
        for row, width in enumerate(padding):
            alone = selections(model, one_row(inputs, row))[0]
            assert torch.equal(batch[row, :, width:], alone), pair
        unreduce_(model)


def with_answers(inputs, seed):
    """Return inputs of training whose last three tokens are an answer."""
    ids = torch.randint(3, 90, (2, 3), generator=torch.Generator().manual_seed(seed))
    answer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in inputs:
        if name.endswith("token_type_ids"):
            answer[name] = inputs[name][:, -1:].expand(-1, 3)
    longer = {name: torch.cat((inputs[name], value), 1) for name, value in answer.items()}
    labels = longer["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | longer | {"labels": labels}


@pytest.mark.parametrize("strategy", GUIDED)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_selects_by_the_prompt_as_generate_does(name, strategy):
    model, inputs = built(name)
    if reason := why_unsupported(model, strategy):
        pytest.skip(reason)
    reduce_(model, strategy, keep=0.3)
    expected = selections(model, inputs)
    width = expected.shape[2]
    for seed in range(4):
        assert torch.equal(selections(model, with_answers(inputs, seed))[..., :width], expected)


@pytest.mark.parametrize("strategy", GUIDED)
def test_an_image_behind_an_answer_has_the_question_of_its_own_turn(strategy):
    model, inputs = built("llava", rows=((4, "image", 5), (2, "image", 4, "image", 6)))
    reduce_(model, strategy, keep=0.3)
    expected = selections(model, inputs)
    labels = torch.full_like(inputs["input_ids"], -100)
    second = (inputs["input_ids"][1] == IMAGE).nonzero()[16, 0]
    labels[1, second - 2 : second] = 5
    first = inputs["input_ids"].clone()
    first[1, second - 2 : second] = 9
    one, two = (
        selections(model, inputs | {"input_ids": ids, "labels": labels})[1]
        for ids in (first, inputs["input_ids"])
    )
    assert torch.equal(one[:, :second], two[:, :second])  # the answer is not read
    assert torch.equal(two[:, second:], expected[1, :, second:])  # all text before the image is


@pytest.mark.parametrize("strategy", GUIDED)
def test_a_mask_marks_the_question_where_no_labels_do(strategy):
    model, inputs = built("llava")
    reduce_(model, strategy, keep=0.3)
    expected, width = selections(model, inputs), inputs["input_ids"].shape[1]
    answered = with_answers(inputs, 0)
    labels = answered.pop("labels")
    marked = (labels == -100) & answered["attention_mask"].bool()
    with guidance(model, question=marked):
        assert torch.equal(selections(model, answered)[..., :width], expected)
        twice = {name: value.repeat_interleave(2, 0) for name, value in answered.items()}
        twice["pixel_values"] = answered["pixel_values"][[0, 0, 1, 2, 1, 2]]
        assert torch.equal(selections(model, twice)[::2, ..., :width], expected)
    assert not torch.equal(selections(model, answered)[..., :width], expected)


STRATEGIES = (*GUIDED, "random_tokens", "pool")


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llava", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_generate_selects_once_with_and_without_a_cache(name, strategy):
    model, inputs = built(name)
    reduce_(model, strategy, keep=0.3)
    outputs, kept, width = [], [], inputs["input_ids"].shape[1]
    for use_cache in (True, False):
        torch.manual_seed(0)
        with record_stages(model) as infos:
            outputs.append(oracle.stock_generate(model, inputs, use_cache=use_cache))
        prompts = infos[:1] if use_cache else infos
        kept += [(info.kept, *info.kept_behind) for info in prompts]
    assert len(kept) == 7
    for levels in kept[1:]:
        assert all(map(torch.equal, (level[:, :width] for level in levels), kept[0]))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert all(map(oracle.close, outputs[0].logits, outputs[1].logits))


WRONG = {
    "a tensor": (torch.ones(2, 9), TypeError, r"bool tensor \(B, N\), got torch.float32 \(2, 9\)"),
    "a list": ([True], TypeError, r"bool tensor \(B, N\), got list"),
    "no row": (torch.ones(0, 9) > 0, ValueError, r"one row .* got shape \(0, 9\); pass"),
    "no column": (torch.ones(2, 0) > 0, ValueError, r"one token, got shape \(2, 0\); pass"),
    "on meta": (torch.ones(2, 9, device="meta") > 0, ValueError, "got one on the device meta"),
    "no token": (torch.zeros(2, 9, dtype=torch.bool), ValueError, "a token in each row"),
    "longer": (torch.ones(2, 99, dtype=torch.bool), ValueError, r"got \(2, 99\); pass the mask"),
    "before": (torch.eye(9, dtype=torch.bool)[:2], ValueError, "last token behind each image"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_question_is_refused_with_the_requirement(wrong):
    model, inputs = built("llava")
    question, error, message = WRONG[wrong]
    with pytest.raises(ValueError, match="call reduce_ with such a strategy first"):
        guidance(model, question=torch.ones(1, 1)).__enter__()
    reduce_(model, "fastv:layer=1")
    with pytest.raises(error, match=message), guidance(model, question=question):
        model(**inputs)


def test_an_interrupted_training_step_leaves_no_labels():
    model, inputs = built("llava", rows=((4, "image", 9), (2, "image", 1, "image", 9)))
    reduce_(model, "cdpruner", keep=0.3)
    expected = selections(model, inputs)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)

    def interrupt(*_):
        raise KeyboardInterrupt

    layer = find_multimodal(model).language_model.layers[1]
    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, labels=labels)
    hook.remove()
    assert torch.equal(selections(model, inputs), expected)
