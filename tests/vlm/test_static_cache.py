"""Static caches: the tokens of the dynamic cache, and steps of decoding without a graph break."""

import pytest
import torch
import torch.nn.functional as F
from transformers import StaticCache

from elip_models import guidance, reduce_, unreduce_
from tests.helpers.tiers import slow_except
from tests.vlm import oracle
from tests.vlm.models import build, prompt
from tests.vlm.test_generation import _windowed
from tests.vlm.test_question import why_unsupported

QUICK = ("llava", "gemma3", "gemma4", "qwen2_5_vl")  # layers of gemma4 share keys
STRATEGIES = (("diverse:relevance=true",), ("fastv:layer=2",), ("stride", "fastv:layer=2"))
SLOW = ("paligemma", "qwen3_vl_video", "llama4", "llava_next", "idefics2")
FAMILIES = slow_except(QUICK, (*QUICK, *SLOW))


def reduced(name, strategies=("diverse",), attention="sdpa"):
    model, inputs = build(name, attention)
    for strategy in strategies:
        reduce_(model, strategy, keep=0.3)
    return model, inputs


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_has_the_tokens_and_logits_of_the_dynamic_cache(name):
    model = build(name)[0]
    for strategies in STRATEGIES:
        if any(why_unsupported(model, strategy) for strategy in strategies):
            continue
        model, inputs = reduced(name, strategies)
        expected = oracle.stock_generate(model, inputs)
        output = oracle.stock_generate(model, inputs, cache_implementation="static")
        assert torch.equal(output.sequences, expected.sequences)
        assert all(map(oracle.close, output.logits, expected.logits))


@torch.no_grad()
@pytest.mark.parametrize("strategies", STRATEGIES, ids=" ".join)
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"attention": "eager"}], ids=str)
def test_beams_and_eager_attention(strategies, settings):
    settings = dict(settings)
    model, inputs = reduced("llava", strategies, settings.pop("attention", "sdpa"))
    expected = oracle.stock_generate(model, inputs, **settings)
    output = oracle.stock_generate(model, inputs, cache_implementation="static", **settings)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("strategies", STRATEGIES, ids=" ".join)
def test_steps_of_decoding_compile_to_one_graph(strategies):
    torch.compiler.reset()  # graphs of earlier tests count against the limit of recompilations
    model, inputs = reduced("llava", strategies)
    expected, length = oracle.stock_generate(model, inputs), inputs["input_ids"].shape[1]
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=length + 6)
    for step, logits in enumerate(expected.logits):
        mask = torch.ones_like(expected.sequences[:, : length + step])
        mask[:, :length] = inputs["attention_mask"]
        is_first, positions = step == 0, (mask.cumsum(1) - 1).clamp(min=0)
        ids = expected.sequences[:, : length + step]
        new = model.prepare_inputs_for_generation(
            ids if is_first else ids[:, -1:],
            cache=cache,
            attention_mask=mask,
            position_ids=positions if is_first else positions[:, -1:].clone(),
            is_first_iteration=is_first,
            pixel_values=inputs["pixel_values"] if is_first else None,
            use_cache=True,
        )
        output = (model if is_first else compiled)(**new).logits[:, -1]
        assert oracle.close(output.float(), logits)
    assert len(graphs) == 1


@torch.no_grad()
def test_the_cache_has_slots_for_the_tokens_that_remain_alone():
    model, inputs = reduced("llava", ("fastv:layer=2",))
    output = oracle.stock_generate(model, inputs, cache_implementation="static")
    cache, length = oracle.cache_of(output)[1], output.sequences.shape[1] - 1
    assert [layer.keys.shape[2] for layer in cache.layers] == [length, length, length - 11]
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [length] * 3


@torch.no_grad()
@pytest.mark.parametrize("strategies", STRATEGIES[1:], ids=" ".join)
def test_a_cache_is_used_again_after_its_reset_or_an_error(strategies):
    model, inputs = reduced("llava", strategies)
    expected, length = oracle.stock_generate(model, inputs), inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + 6)
    slots = [layer.max_cache_len for layer in cache.layers]
    unfit = torch.ones(2, length + 1, dtype=torch.bool)
    for error in (None, "question: expected"):
        if error is not None:
            with guidance(model, question=unfit), pytest.raises(ValueError, match=error):
                model(**inputs, past_key_values=cache)
        output = oracle.stock_generate(model, inputs | {"past_key_values": cache})
        assert torch.equal(output.sequences, expected.sequences)
        cache.reset()
        assert [layer.get_max_length() for layer in cache.layers] == slots
    text = prompt(model, {}, ((length - 3,), (length,)))
    output = oracle.stock_generate(model, text | {"past_key_values": cache})
    assert torch.equal(output.sequences, oracle.stock_generate(model, text).sequences)


@torch.no_grad()
def test_a_static_cache_that_cannot_fit_is_refused():
    model, inputs = reduced("llava")
    output = oracle.stock_generate(model, inputs, cache_implementation="static")
    name, cache = oracle.cache_of(output)
    for ids in (inputs["input_ids"], torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="one token behind a static cache"):
            model(input_ids=ids, pixel_values=inputs["pixel_values"], **{name: cache})
    cache = StaticCache(config=model.config, max_cache_len=99)
    model(input_ids=torch.ones(2, 3, dtype=torch.long), **{name: cache})
    mask = F.pad(inputs["attention_mask"], (3, 0), value=1)
    with pytest.raises(ValueError, match="cache: expected an empty static cache"):
        model(**inputs | {"attention_mask": mask, name: cache})
    cache = oracle.cache_of(output)[1]
    token = {"input_ids": torch.ones(2, 1, dtype=torch.long), name: cache}
    with pytest.raises(TypeError, match=r"attention_mask: expected \(B, 1, 1, N\)"):
        model(**token)
    unreduce_(model)
    with pytest.raises(ValueError, match="cache: expected a model that reduce_ has changed"):
        model(**token)
    model, inputs = _windowed(inputs["input_ids"].shape[1] + 2)
    reduce_(model)
    with pytest.raises(ValueError, match="expected a static cache shorter than"):
        oracle.stock_generate(model, inputs, cache_implementation="static", max_new_tokens=3)
