"""Mllama, whose language model reads images by cross-attention."""

from contextlib import contextmanager

import pytest
import torch
import transformers as hf

from elip_models import (
    is_reduced,
    record_stages,
    reduce_,
    reduction_summary,
    unreduce_,
)
from tests.vlm import oracle
from tests.vlm.configs import IMAGE, PAD, TEXT, VISION
from tests.vlm.models import model_of
from tests.vlm.test_training import assert_trains_as_oracle

TILE = 17  # tokens: 4x4 patches and the class token


@pytest.fixture(scope="module")
def built():
    """Return a model, and a batch of which one row has two images and one has a single tile."""
    torch.manual_seed(0)
    vision = VISION | dict(
        num_global_layers=1,
        max_num_tiles=2,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    text |= {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}}
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = model_of(config, "sdpa").float()  # the tower of padded tiles is NaN in fp64
    for name, weight in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.ones_(weight)
    ids = torch.randint(3, 90, (2, 9))
    ids[0, 1], ids[0, 4], ids[1, :2], ids[1, 2] = IMAGE, IMAGE, PAD, IMAGE
    mask = torch.zeros(2, 9, 2, 2, dtype=torch.long)
    mask[0, 1:, 0] = mask[0, 4:, 1] = mask[1, 2:, 0, 0] = 1
    return model, {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.randn(2, 2, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[2, 3], [1, 0]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1], [1, 1]], [[1, 0], [0, 0]]]),
        "cross_attention_mask": mask,
    }


@pytest.fixture
def case(built):
    yield built
    unreduce_(built[0])


@contextmanager
def without(model, kept):
    """Hide the tokens beside `kept` (B, M) bool from the cross-attention of the stock model."""

    def hide(module, args, kwargs):
        mask = kwargs["cross_attention_mask"]
        hidden = ~kept.repeat_interleave(len(mask) // len(kept), 0)[:, None, None]
        mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return args, kwargs | {"cross_attention_mask": mask}

    handle = model.model.language_model.register_forward_pre_hook(hide, with_kwargs=True)
    yield
    handle.remove()


STRATEGIES = ["diverse", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cdpruner", "stride"))]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_keeping_every_token_changes_nothing(case, attention):
    case[0].set_attn_implementation(attention)
    oracle.assert_unchanged_with_every_token(*case)
    case[0].set_attn_implementation("sdpa")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"use_cache": False}], ids=str)
def test_ways_to_generate(case, settings):
    model, inputs = case
    reduce_(model, keep=0.5)
    output, kept = oracle.generate(model, inputs, **settings)
    unreduce_(model)
    with without(model, kept[:: settings.get("num_beams", 1)]):
        expected = oracle.stock_generate(model, inputs, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(oracle.close, output.logits, expected.logits))


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_result_is_that_of_the_model_without_removed_tokens(case, strategy):
    model, inputs = case
    dense = model(**inputs).logits
    reduce_(model, strategy, keep=0.5)
    logits, kept = oracle.forward(model, inputs)
    output = oracle.stock_generate(model, inputs)
    assert (kept.view(-1, TILE).sum(1) == 8).all() and kept.shape == (2, 4 * TILE)
    unreduce_(model)
    with without(model, kept):
        expected, stock = model(**inputs).logits, oracle.stock_generate(model, inputs)
    read = inputs["attention_mask"].bool()
    assert oracle.close(logits[read], expected[read])
    assert (dense - expected)[read].abs().max() > 1e-2
    assert torch.equal(output.sequences, stock.sequences)
    assert all(map(oracle.close, output.logits, stock.logits))


def test_loss_and_gradients_are_those_of_the_model_without_removed_tokens(case):
    model, inputs = case
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    reduce_(model, keep=0.5)
    assert_trains_as_oracle(
        model, inputs | {"labels": labels}, lambda model, info: without(model, info.kept)
    )


@torch.no_grad()
def test_the_cache_holds_the_tokens_that_remain(case):
    model, inputs = case
    reduce_(model, keep=5)
    with record_stages(model) as infos:
        model(**inputs, use_cache=True)
    assert infos[0].cached == (9, 4 * 5, 9)
    summary = reduction_summary(model)
    assert (summary.kept_tokens, summary.image_tokens) == (5, TILE)
    assert summary.layer_tokens == (0, 5, 0)
    assert "5 of 17 in a tile" in str(summary)
    assert summary.cache_bytes * TILE == summary.dense_cache_bytes * 5


@torch.no_grad()
def test_a_static_cache_is_refused(case):
    model, inputs = case
    reduce_(model, keep=0.5)
    with pytest.raises(TypeError, match="expected a dynamic cache, got StaticCache"):
        oracle.stock_generate(model, inputs, cache_implementation="static")


def second_turn(inputs, output):
    """Return the arguments of a turn with the same images and text behind a cache."""
    name, cache = oracle.cache_of(output)
    mask = inputs["cross_attention_mask"].repeat(1, 2, 2, 1)
    mask[:, :9, 2:] = 0
    further = {"attention_mask": inputs["attention_mask"].repeat(1, 2), name: cache}
    return inputs | further | {"cross_attention_mask": mask}


@torch.no_grad()
def test_a_second_turn_has_new_images(case):
    model, inputs = case
    reduce_(model, keep=5)
    with record_stages(model) as infos:
        logits = model(**second_turn(inputs, model(**inputs, use_cache=True))).logits
    kept = [info.kept for info in infos]
    unreduce_(model)
    with without(model, kept[0]):
        first = model(**inputs, use_cache=True)
    with without(model, torch.cat(kept, 1)):
        expected = model(**second_turn(inputs, first)).logits
    read = inputs["attention_mask"].bool()
    assert oracle.close(logits[read], expected[read])


@pytest.mark.parametrize("strategy", ["fastv", "visionzip", "evs"])
def test_strategies_that_need_image_tokens_in_the_prompt_are_refused(case, strategy):
    with pytest.raises(TypeError, match=f"model: expected one .* for '{strategy}', got mllama"):
        reduce_(case[0], strategy)
    assert not is_reduced(case[0])
