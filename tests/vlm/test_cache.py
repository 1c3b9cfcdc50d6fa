"""The key-value cache of a reduced model: its lengths, its rows, and its limits."""

import pytest
import torch

from elip_models import record_stages, reduce_, unreduce_
from elip_models.vlm.families import find_multimodal
from tests.vlm import oracle
from tests.vlm.configs import CASES, EAGER
from tests.vlm.models import build, prompt

STRATEGIES = ("diverse", "fastv:layer=1", "pyramid:stages=3")
FAMILIES = [name for name in ("llava", "gemma3", "qwen2_5_vl") if name in CASES]


def reduced(name="llava", strategy="diverse"):
    model, inputs = build(name, "eager" if name in EAGER else "sdpa")
    return reduce_(model, strategy, keep=0.5), inputs


def filled(model, inputs):
    """Return the output of a first turn, and its cache."""
    output = model(**inputs, use_cache=True)
    return output, oracle.cache_of(output)[1]


def held_lengths(cache):
    return [layer.keys.shape[-2] for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_callers_see_the_whole_length_and_the_language_model_what_is_held(name, strategy):
    model, inputs = reduced(name, strategy)
    seen = []

    def note(layer, args, kwargs):
        cache = next(kwargs[key] for key in oracle.CACHE_NAMES if kwargs.get(key) is not None)
        seen.append((cache.get_seq_length(), cache.get_mask_sizes(1, 0)[0]))

    first = find_multimodal(model).language_model.layers[0]
    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    with record_stages(model) as infos:
        output = oracle.stock_generate(model, inputs)
    handle.remove()
    cache = oracle.cache_of(output)[1]
    length = output.sequences.shape[1] - 1  # the last token is not read
    held = [info.cached[0] for info in infos]
    assert seen == [(0, 1), *((number, number + 1) for number in held[:-1])]
    assert held_lengths(cache) == list(infos[-1].cached)
    assert min(infos[-1].cached) < length
    for i in range(len(cache.layers)):
        assert cache.get_seq_length(i) == length
        assert cache.get_mask_sizes(3, i) == (length + 3, 0)


CHANGES = {
    "reorder_cache": (torch.tensor([1, 0]), torch.tensor([1, 0])),
    "batch_select_indices": (torch.tensor([1]), torch.tensor([1])),
    "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1])),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_those_of_the_sequences(strategy, change):
    model, inputs = reduced(strategy=strategy)
    further = prompt(model, {}, ((2,), (5,)))
    expected = oracle.next_turn(model, filled(model, inputs)[0], inputs, further).logits
    argument, rows = CHANGES[change]
    output, cache = filled(model, inputs)
    getattr(cache, change)(argument)
    turns = (
        {key: value[rows] for key, value in turn.items() if "pixel" not in key}
        for turn in (inputs, further)
    )
    assert oracle.close(oracle.next_turn(model, output, *turns).logits, expected[rows])


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_that_counts_every_token_cannot_continue(strategy):
    model, inputs = reduced(strategy=strategy)
    output, _ = filled(model, inputs)
    unreduce_(model)
    with pytest.raises(ValueError, match="cache: expected a model that reduce_ has changed"):
        oracle.next_turn(model, output, inputs, prompt(model, {}, ((2,), (5,))))
