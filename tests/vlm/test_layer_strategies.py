"""Image tokens removed behind layers of the language model."""

from contextlib import contextmanager
from functools import partial
from itertools import product

import pytest
import torch

from elip_kernels import cls_attention
from elip_models import is_reduced, record_stages, reduce_, reduction_summary, unreduce_
from elip_models.vlm.call import current_call
from elip_models.vlm.families import find_multimodal
from elip_models.vlm.strategies.layer_strategy import FastV, Pyramid
from tests.helpers.tiers import tiered
from tests.vlm import oracle
from tests.vlm.configs import CASES, EAGER
from tests.vlm.models import build
from tests.vlm.test_generation import of_window
from tests.vlm.test_training import assert_trains_as_oracle, trained

FAST = [name for name in ("llava", "qwen2_5_vl", "gemma3") if name in CASES]
FRONTS = (None, "stride")


def built(name, attention="sdpa"):
    return build(name, "eager" if name in EAGER else attention)


def first_layer(model):
    """Return how many layers must read every token."""
    return max(1, len(getattr(find_multimodal(model).tower, "deepstack_visual_indexes", ())))


@contextmanager
def hidden(model, drops, kept_behind):
    """Hide removed columns from the layers behind each drop of a stock model."""
    layers = find_multimodal(model).language_model.layers
    handles = [
        layer.register_forward_pre_hook(partial(hide, kept), with_kwargs=True)
        for i, layer in enumerate(layers)
        for kept in [k for at, k in zip(drops, kept_behind, strict=True) if at <= i][-1:]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hide(kept, layer, args, kwargs):
    mask, queries = kwargs.get("attention_mask"), args[0].shape[1]
    cache = next((kwargs[n] for n in oracle.CACHE_NAMES if kwargs.get(n) is not None), None)
    past = 0 if cache is None else cache.layers[0].get_seq_length() - (queries == 1)
    if mask is None:
        seen = torch.arange(past + queries) <= torch.arange(past, past + queries)[:, None]
        mask = seen.expand(len(kept), 1, -1, -1)
    columns = torch.ones(len(kept), mask.shape[-1], dtype=torch.bool)
    columns[:, : kept.shape[1]] = kept[:, : mask.shape[-1]]
    value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return args, kwargs | {"attention_mask": mask.masked_fill(~columns[:, None, None], value)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "front"), tiered(product(CASES, FRONTS), product(FAST, FRONTS)), ids=str
)
def test_logits_and_decoding_are_those_of_layers_without_removed_columns(name, front):
    model, inputs = built(name)
    strategy = FastV(layer=first_layer(model), keep=0.5)
    if reason := strategy.why_unsupported(find_multimodal(model)):
        with pytest.raises(TypeError, match=reason):
            reduce_(model, strategy)
        return
    if front is not None:
        reduce_(model, front, keep=0.5)
    reduce_(model, strategy)
    with record_stages(model) as infos:
        found = oracle.stock_generate(model, inputs)
    info = infos[0]
    assert not torch.equal(info.kept, info.kept_behind[0])
    unreduce_(model)
    drops = strategy.drops(len(find_multimodal(model).language_model.layers))
    with oracle.hidden(model, info.kept), hidden(model, drops, info.kept_behind):
        expected = oracle.stock_generate(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(oracle.close, found.logits, expected.logits))


@torch.no_grad()
@pytest.mark.parametrize("front", [None, "stride"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_decoding_beyond_a_window_is_that_of_layers_without_removed_columns(name, front):
    model, inputs = of_window(name, 999)
    model, inputs = of_window(name, inputs["input_ids"].shape[1] + 2)
    if front is not None:
        reduce_(model, front, keep=0.5)
    reduce_(model, "pyramid:stages=3", keep=0.5)
    with record_stages(model) as infos:
        found = oracle.stock_generate(model, inputs, max_new_tokens=40)
    info = infos[0]
    unreduce_(model)
    with oracle.hidden(model, info.kept), hidden(model, (1, 2), info.kept_behind):
        expected = oracle.stock_generate(model, inputs, max_new_tokens=40, use_cache=False)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(oracle.close, found.logits, expected.logits))


@torch.no_grad()
def test_a_prompt_beyond_a_window_is_refused_inside_the_language_model():
    model, inputs = of_window("mistral", 30)
    reduce_(model, "fastv:layer=1", keep=0.5)
    with pytest.raises(ValueError, match=r"at most 30 tokens, the window.* 'fastv' .*'diverse'"):
        model(**inputs)
    reduce_(model, "diverse", keep=0.2)  # the prompt counts as a whole
    with pytest.raises(ValueError, match="at most 30 tokens"):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", FAST)
def test_a_pyramid_removes_tokens_at_each_border(name):
    model, inputs = built(name)
    dense = model(**inputs).logits
    strategy = Pyramid(stages=3, keep=0.5)
    reduce_(model, strategy)
    with record_stages(model) as infos:
        logits = model(**inputs, use_cache=True).logits
    info, drops = infos[0], strategy.drops(3)
    assert drops == (1, 2)
    first, second = (kept.sum(1) for kept in info.kept_behind)
    assert (second < first).all() and (first < info.kept.sum(1)).all()
    longest = [int(each.sum(1).max()) for each in (info.kept, *info.kept_behind)]
    assert list(info.cached) == longest  # the exact length of each layer's cache
    unreduce_(model)
    with hidden(model, drops, info.kept_behind):
        expected = model(**inputs).logits
    read = info.kept_behind[-1] & inputs["attention_mask"].bool()
    assert oracle.close(logits[read], expected[read])
    assert (logits[~info.kept_behind[-1]] - logits[~info.kept_behind[-1]][:1]).abs().max() == 0
    assert torch.equal(model(**inputs).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tokens_that_the_last_one_attends_to_most_stay(attention):
    model, inputs = built("llava", attention)
    reduce_(model, "fastv:layer=2", keep=0.25)
    layer, seen = find_multimodal(model).language_model.layers[1].self_attn, {}
    layer.q_proj.register_forward_hook(lambda m, a, out: seen.update(q=out))
    layer.k_proj.register_forward_hook(lambda m, a, out: seen.update(k=out))
    rotate = {}
    layer.register_forward_pre_hook(
        lambda m, a, kw: rotate.update(r=kw["position_embeddings"]), with_kwargs=True
    )
    with record_stages(model) as infos:
        model(**inputs)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (seen[n].unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for n in "qk")
    q, k = apply_rotary_pos_emb(q, k, *rotate["r"])
    row = cls_attention(q[:, :, -1], k, mask=inputs["attention_mask"].bool())
    images, kept = infos[0].images, infos[0].kept_behind[0]
    for b in range(len(images)):
        edges = torch.nn.functional.pad(images[b].int(), (1, 1)).diff()
        for start, end in zip(*((edges == s).nonzero()[:, 0] for s in (1, -1)), strict=True):
            order = row[b, start : end - 1].argsort(descending=True)
            count = round(0.25 * int(end - start))
            best = sorted([*order[: count - 1].tolist(), int(end - start) - 1])
            assert kept[b, start:end].nonzero()[:, 0].tolist() == best


def test_loss_and_gradients_train_the_model_with_fewer_tokens():
    model, inputs = trained("llava")
    reduce_(model, "fastv:layer=1", keep=0.5)
    assert_trains_as_oracle(
        model, inputs, lambda model, info: hidden(model, (1,), info.kept_behind)
    )


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1", "visionzip"])
def test_an_error_in_a_layer_leaves_nothing_behind(strategy):
    model, inputs = build("llava", rows=((4, "image", 3), (2, "image", 1, "image", 6)))
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    dense = model(**text).logits
    reduce_(model, strategy, keep=0.5)
    expected = model(**inputs).logits

    def fail(layer, args):
        raise RuntimeError("out of memory")

    layer, before = find_multimodal(model).language_model.layers[-1], current_call()
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**inputs)
    handle.remove()
    assert current_call() is before
    assert torch.equal(model(**text).logits, dense)
    assert torch.equal(model(**inputs).logits, expected)


def test_one_strategy_of_each_place_is_used_together():
    model, _ = built("llava")
    reduce_(model, "tome", keep=0.7)
    reduce_(model, "diverse", keep=0.5)
    reduce_(model, "fastv:layer=1", keep=0.5)
    reduce_(model, "stride", keep=8)
    summary = reduction_summary(model)
    assert summary.strategy.name == "stride" and summary.inside == FastV(1, 0.5)
    assert summary.layer_tokens == (8, 4, 4)
    assert summary.tower.strategy.name == "tome"
    assert "tome" in str(summary) and "fastv" in repr(model)
    unreduce_(model)
    assert not is_reduced(model)


@pytest.mark.parametrize("layer", [3, 40])
def test_a_drop_behind_the_last_layer_is_refused(layer):
    model, _ = built("llava")
    with pytest.raises(ValueError, match="one of the first 2 layers of 3"):
        reduce_(model, FastV(layer=layer))
    assert not is_reduced(model)
