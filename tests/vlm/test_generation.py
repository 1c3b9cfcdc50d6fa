"""Generation of reduced models: turns, embeddings, copies, threads and what is refused."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from elip_models import guidance, is_reduced, record_stages, reduce_, unreduce_
from elip_models.vlm.attention_probe import is_watched
from elip_models.vlm.families import find_multimodal
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiers import slow_except, tiered
from tests.vlm import oracle
from tests.vlm.configs import CASES, EAGER, IMAGE, TEXT
from tests.vlm.models import build, model_of, pixels_of, prompt

QUICK = ("llava", "gemma3", "qwen3_vl")
"""Masks of two dimensions, dicts of masks, and positions of three axes."""
SLOW = ("paligemma", "qwen2_5_vl", "idefics2")
IMAGES = [name for name in CASES if not name.endswith("_video")]
some = pytest.mark.parametrize("name", slow_except(QUICK, (*QUICK, *SLOW)))


def made(name, rows=None):
    return build(name, "eager" if name in EAGER else "sdpa", rows)


@torch.no_grad()
@some
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"use_cache": False}], ids=str)
def test_ways_to_generate(name, settings):
    model, inputs = made(name)
    oracle.skip_gap("beams" if "num_beams" in settings else "no cache", model)
    _assert_generates_as_oracle(model, inputs, **settings)


def _assert_generates_as_oracle(model, inputs, dense=None, **settings):
    reduce_(model, keep=0.5)
    output, kept = oracle.generate(model, inputs, **settings)
    unreduce_(model)
    settings |= dense or {}
    if find_multimodal(model).recurrent_layers:
        settings["use_cache"] = False  # the oracle does not reorder beams
    with oracle.hidden(model, kept[:: settings.get("num_beams", 1)]):
        expected = oracle.stock_generate(model, inputs, **settings)
    assert not kept.all()
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(oracle.close, output.logits, expected.logits))


TURNS = {
    "text": ((2,), (5,)),
    "a word": ((1,), (1,)),
    "image": ((2, "image", 3), (4, "image", 1, "image", 2)),
    "ragged": ((2,), (4, "image", 1, "image", 1, "image", 2)),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rows", "first"),
    tiered(
        product(IMAGES, TURNS, ("images", "text")), product(QUICK, ["text"], ("images", "text"))
    ),
)
def test_a_second_turn_with_the_cache_of_the_first(name, rows, first):
    model, inputs = made(name)
    pixels = pixels_of(inputs)
    if first == "text":
        inputs = prompt(model, {}, ((6,), (3,)))
    after = prompt(model, pixels, TURNS[rows])
    if rows not in ("text", "a word"):
        after |= pixels
    third = prompt(model, {}, ((1,), (3,)))
    reduce_(model, keep=0.5)
    if rows == "ragged" and find_multimodal(model).recurrent_layers:
        with pytest.raises(ValueError, match=r"rows in which as many tokens remain.*got .*one row"):
            _three_turns(model, inputs, after, third)
        return
    with record_stages(model) as infos:
        logits = _three_turns(model, inputs, after, third)
    unreduce_(model)
    with oracle.hidden(model, torch.cat([info.kept for info in infos], 1)):
        expected = _three_turns(model, inputs, after, third)
    for turn, other, info in zip(logits, expected, infos, strict=True):
        assert oracle.close(turn[info.kept], other[info.kept])


def _three_turns(model, inputs, after, third):
    """Return the logits of each turn at tokens of no padding, and zeros elsewhere."""
    one = model(**inputs, use_cache=True)
    two = oracle.next_turn(model, one, inputs, after)
    both = {key: torch.cat((inputs[key], after[key]), 1) for key in ("input_ids", "attention_mask")}
    three = oracle.next_turn(model, two, both, third)
    turns = ((one, inputs), (two, after), (three, third))
    return [turn.logits * part["attention_mask"].unsqueeze(-1) for turn, part in turns]


@torch.no_grad()
@some
def test_generate_continues_a_generation(name):
    model, inputs = made(name)
    further = prompt(model, {}, ((3,), (6,)))
    reduce_(model, keep=0.5)
    with record_stages(model) as infos:
        output = _two_generations(model, inputs, further)
    unreduce_(model)
    with oracle.hidden(model, infos[0].kept):
        expected = _two_generations(model, inputs, further)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(oracle.close, output.logits, expected.logits))


def _two_generations(model, inputs, further):
    first = oracle.stock_generate(model, inputs)
    name, cache = oracle.cache_of(first)
    ids = torch.cat((first.sequences, further["input_ids"]), 1)
    made = torch.ones_like(first.sequences[:, inputs["input_ids"].shape[1] :])
    mask = torch.cat((inputs["attention_mask"], made, further["attention_mask"]), 1)
    return oracle.stock_generate(model, {"input_ids": ids, "attention_mask": mask, name: cache})


@torch.no_grad()
@pytest.mark.parametrize("name", slow_except(("llava", "gemma3", "qwen2_5_vl"), IMAGES))
def test_embeddings_in_place_of_ids(name):
    model, inputs = made(name)
    oracle.skip_gap("embeddings", model)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    reduce_(model, keep=0.5)
    _, kept = oracle.assert_as_without_removed(model, inputs)
    assert not kept.all(1).any()


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1"])
def test_embeddings_that_hold_image_features_are_refused(strategy):
    model, inputs = made("llava")
    read = []
    language_model = find_multimodal(model).language_model
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    reduce_(model, strategy, keep=0.5)
    with pytest.raises(ValueError, match="inputs_embeds: expected the placeholders of images"):
        model(inputs_embeds=read[0], attention_mask=inputs["attention_mask"])
    assert oracle.stock_generate(model, inputs).sequences.shape[0] == 2


def _unpickled(model):
    return pickle.loads(pickle.dumps(model))


@torch.no_grad()
@pytest.mark.parametrize("name", slow_except(QUICK, ("llava", "qwen2_5_vl", "gemma3")))
@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1"])
@pytest.mark.parametrize("clone", [copy.deepcopy, _unpickled])
def test_copies_are_reduced_and_unreduce_leaves_nothing(name, strategy, clone):
    _, inputs = made(name)
    model = model_of(CASES[name]()[0], "sdpa")  # no model of transformers that ran can be pickled
    other = clone(reduce_(model, strategy, keep=0.5))
    logits = other(**inputs).logits
    assert torch.equal(logits, model(**inputs).logits)
    unreduce_(other)
    assert is_reduced(model) and not is_reduced(other)
    layers = find_multimodal(other).language_model.layers
    assert not any(is_watched(layer.self_attn) or layer._forward_pre_hooks for layer in layers)
    assert "extra_repr" not in vars(find_multimodal(other).model)
    dense = other(**inputs).logits
    assert torch.equal(dense, unreduce_(model)(**inputs).logits) and not torch.equal(dense, logits)


@torch.no_grad()
def test_threads_share_a_model():
    model, inputs = made("llava")
    batches = [
        inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])} for _ in range(8)
    ]
    reduce_(model, keep=0.5)
    alone = [oracle.stock_generate(model, batch).logits for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: oracle.stock_generate(model, batch).logits, batches))
    for logits, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, logits, expected))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_a_compiled_model_computes_the_same(name):
    model, inputs = made(name)
    reduce_(model, keep=0.5)
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    assert oracle.close(compiled(**inputs).logits, expected)
    assert oracle.close(compiled(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_hidden_states_have_the_whole_length():
    model, inputs = made("llava")
    reduce_(model, keep=0.5)
    with record_stages(model) as infos:
        output = model(**inputs, output_hidden_states=True)
    for states in output.hidden_states:
        assert states.shape[:2] == inputs["input_ids"].shape
        assert not states[~infos[0].kept].any() and states[infos[0].kept].any(-1).all()
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


def _windowed(window):
    config, pixels = CASES["llava"]()
    config.text_config = hf.MistralConfig(**TEXT, sliding_window=window)
    model = model_of(config, "sdpa")
    return model, pixels | prompt(model, pixels, ((4, "image", 3), (2, "image", 1, "image", 6)))


def of_window(name, window):
    """Return a model of a family whose window, or chunk, is small, and a prompt without padding."""
    if name == "mistral":
        model, inputs = _windowed(window)
    else:
        config, pixels = CASES[name]()
        text = config.text_config
        names = {"llama4": "attention_chunk_size"}
        setattr(text, names.get(name, "sliding_window"), window)
        text.attn_temperature_tuning = False
        model = model_of(config, "eager" if name in EAGER else "sdpa")
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in pixels.items()}
    rows = ((2, "image", 1, "image", 1, "image", 6),)
    return model, inputs | prompt(model, inputs, rows)


WINDOWED = ("mistral", "gemma3", "aya_vision", "llama4", "paligemma2", "gemma4", "exaone4_5")
windowed = pytest.mark.parametrize("name", slow_except(WINDOWED[:2], WINDOWED))


@torch.no_grad()
@windowed
@pytest.mark.parametrize("share", [1.2, 0.5], ids=["longer than the prompt", "shorter"])
def test_generation_beyond_a_window_is_that_without_removed_columns(name, share):
    model, inputs = of_window(name, 999)
    model, inputs = of_window(name, int(share * inputs["input_ids"].shape[1]))
    _assert_generates_as_oracle(model, inputs, dense={"use_cache": False}, max_new_tokens=12)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["cdpruner", "pyramid:stages=3"])
def test_assisted_decoding_goes_beyond_a_window(strategy):
    model, inputs = of_window("mistral", 999)
    model, inputs = of_window("mistral", inputs["input_ids"].shape[1] + 4)
    reduce_(model, strategy, keep=0.5)
    expected = oracle.stock_generate(model, inputs, max_new_tokens=20)
    lookup = dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    output = oracle.stock_generate(model, inputs, max_new_tokens=20, **lookup)
    assert torch.equal(output.sequences, expected.sequences)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "aya_vision"])
def test_turns_beyond_a_window_are_those_without_removed_columns(name):
    model, inputs = of_window(name, 30)
    before, further = (prompt(model, {}, ((n,),)) for n in (40, 5))
    reduce_(model, keep=0.5)
    with record_stages(model) as infos:
        logits = _three_turns(model, before, inputs, further)
    unreduce_(model)
    turns = (before, inputs, further)
    whole = {
        key: torch.cat([turn[key] if key in turn else turn["input_ids"] * 0 for turn in turns], 1)
        for key in inputs
        if inputs[key].shape == inputs["input_ids"].shape
    }
    kept = torch.cat([info.kept for info in infos], 1)
    with oracle.hidden(model, kept):
        expected = model(**inputs | whole).logits
    assert not kept.all() and oracle.close(torch.cat(logits, 1)[kept], expected[kept])


def test_attention_without_masks_of_pairs_is_refused_beyond_a_window():
    model, inputs = _windowed(30)
    reduce_(model, keep=0.5)
    model.config.text_config._attn_implementation = "flash_attention_2"
    message = "expected 'sdpa' or 'eager' for a sequence that is longer .*set_attn_implementation"
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["diverse", "fastv:layer=1"])
def test_layers_may_lie_on_several_devices(strategy):
    model, inputs = build("llava", rows=((2, "image", 1, "image", 6),))
    language_model = find_multimodal(model).language_model
    for part in (*language_model.layers[1:], language_model.norm, model.lm_head):
        add_hook_to_module(part.to("meta"), AlignDevicesHook("meta", place_submodules=True))
    reduce_(model, strategy, keep=0.5)
    assert model(**inputs, use_cache=False).logits.device.type == "meta"


def test_llama_4_is_refused_where_the_temperature_of_its_attention_changes():
    config = CASES["llama4"]()[0]
    model = hf.Llama4ForConditionalGeneration(config)
    assert find_multimodal(model).window == config.text_config.attention_chunk_size == 256
    config.text_config.floor_scale = 20
    assert find_multimodal(model).longest == 19
    inputs = prompt(model, CASES["llama4"]()[1], ((2, "image", 1, "image", 1, "image", 9),))
    with pytest.raises(ValueError, match=r"at most 19 tokens, behind which .* temperature"):
        reduce_(model.eval(), keep=0.5)(**CASES["llama4"]()[1] | inputs)


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.5, 20])
def test_a_prefill_in_chunks_that_cut_images_is_refused(keep):
    model, inputs = made("llava")
    settings = {"prefill_chunk_size": 10, "max_new_tokens": 2}
    reduce_(model, keep=keep)
    with pytest.raises(ValueError, match="as prefill_chunk_size cuts them"):
        oracle.stock_generate(model, inputs, **settings)
    reduce_(model, keep=1.0)
    logits = oracle.stock_generate(model, inputs, **settings).logits
    unreduce_(model)
    assert all(map(torch.equal, logits, oracle.stock_generate(model, inputs, **settings).logits))


WHOLE = {
    "cdpruner": "'cdpruner', which reads the question",
    "diverse:relevance=true": "'diverse', which reads the question",
    "fastv:layer=1": "'fastv', which reads the question",
    "pyramid:stages=2": "'pyramid', which reads the question",
    "visionzip": "'visionzip', which reads the attention of the image tower",
}


@UNGUIDED
@torch.no_grad()
@pytest.mark.parametrize("size", [1, 17, 200])
@pytest.mark.parametrize("strategy", WHOLE)
def test_a_strategy_that_reads_the_whole_prompt_is_refused_in_chunks(strategy, size):
    model, inputs = made("llava", rows=((1, "image", 9), (1, "image", 4, "image", 9)))
    reduce_(model, strategy, keep=0.5)
    message = f"prefill_chunk_size: expected None for {WHOLE[strategy]}.*leave prefill_chunk_size"
    marked = guidance(model, question=inputs["attention_mask"].bool())
    for context in (nullcontext(), marked):
        with context, pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=size, pad_token_id=0)


@torch.no_grad()
def test_a_prefill_in_chunks_of_whole_images_is_that_at_once():
    model, inputs = made("llava", rows=((1, "image", 10), (1, "image", 5, "image", 10)))
    reduce_(model, keep=0.5)
    ends = (inputs["input_ids"][1] == IMAGE).nonzero()[15, 0] + 3
    expected = oracle.stock_generate(model, inputs)
    with record_stages(model) as infos:
        output = oracle.stock_generate(model, inputs, prefill_chunk_size=int(ends))
    assert not infos[0].kept.all() and not infos[1].kept.all()
    assert all(map(oracle.close, output.logits, expected.logits))


@torch.no_grad()
def test_a_prefill_in_chunks_of_which_one_begins_with_the_last_token_of_an_image_is_refused():
    model, inputs = made("llava")
    images = inputs["input_ids"] == model.config.image_token_id
    reduce_(model, keep=0.5)
    last = int(images.nonzero()[:, 1].max())
    with pytest.raises(ValueError, match="as prefill_chunk_size cuts them"):
        oracle.stock_generate(model, inputs, prefill_chunk_size=last, max_new_tokens=2)


@UNGUIDED
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_assisted_decoding_has_the_tokens_of_plain_decoding(name):
    model, inputs = made(name)
    one = prompt(model, inputs, ((2, "image", 1, "image", 1, "image", 6),)) | {
        key: value for key, value in inputs.items() if "pixel" in key or key.startswith("image_")
    }
    lookup = dict(max_new_tokens=16, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    crops = []
    for strategies in (("stride",), ("cdpruner",), ("diverse:relevance=true", "fastv:layer=2")):
        unreduce_(model)
        for strategy in strategies:
            reduce_(model, strategy, keep=0.5)
        expected = oracle.stock_generate(model, one, max_new_tokens=16)
        with record_stages(model) as infos:
            output = oracle.stock_generate(model, one, **lookup)
        assert torch.equal(output.sequences, expected.sequences), strategies
        crops += [info.kept.shape[1] for info in infos[1:]]
        further = prompt(model, {}, ((3,),))
        continued = _continued(model, output, one, further)
        assert oracle.close(continued, _continued(model, expected, one, further))
    assert max(crops) > 1  # steps that read candidates, some of which are taken back


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["cdpruner", "fastv:layer=2"])
def test_tokens_that_may_have_been_the_question_are_not_taken_back(strategy):
    model, inputs = made("llava")
    reduce_(model, strategy, keep=0.5)
    cache = oracle.cache_of(model(**inputs, use_cache=True))[1]
    message = r"reads the question, .* guidance\(model, question=mask\), or .* assistant_model"
    with pytest.raises(NotImplementedError, match=message):
        cache.crop(-1)
    for settings in ({"logits_to_keep": 1}, {}):
        with guidance(model, question=inputs["attention_mask"].bool()):
            cache = oracle.cache_of(model(**inputs, use_cache=True, **settings))[1]
        cache.crop(-1)


def _continued(model, output, one, further):
    """Return the logits of a turn behind a generation."""
    before = one | {
        "input_ids": output.sequences[:, :-1],
        "attention_mask": torch.ones_like(output.sequences[:, :-1]),
    }
    return oracle.next_turn(model, output, before, further).logits


@torch.no_grad()
def test_a_static_cache_of_recurrent_layers_is_refused():
    model, inputs = made("lfm2_vl")
    reduce_(model, keep=0.5)
    refused = r"cache: expected a dynamic one, .* got StaticCache .* without cache_implementation"
    with pytest.raises(TypeError, match=refused):
        model.generate(**inputs, max_new_tokens=3, cache_implementation="static")
    cache = hf.StaticCache(config=model.config, max_cache_len=99)
    with pytest.raises(TypeError, match=refused):
        model(**inputs, past_key_values=cache)


@torch.no_grad()
def test_packed_texts_are_refused():
    model, inputs = made("llava")
    reduce_(model, keep=0.5)
    positions = torch.arange(inputs["input_ids"].shape[1]) % 20
    inputs |= {"attention_mask": None, "position_ids": positions.expand(2, -1)}
    with pytest.raises(ValueError, match="several texts packed into a row"):
        model(**inputs)
    assert model(**inputs | {"position_ids": None}).logits.shape[0] == 2  # no state is left
