"""Prefill and decoding of a LLaVA whose language model reads fewer image tokens.

The tower is a small part of the cost, as in the models that people use. Prefill is the forward pass
of one prompt with an image; decoding adds tokens to the cache that it filled, one at a time.
"""

import copy
from functools import partial

import pytest
import torch
import transformers

import elip_models
from benchmarks.cases import DEVICE, DTYPE_NAMES, MAIN_DTYPE
from benchmarks.parity import check_errors, relative_error, why_not_compiled
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side

DENSE = "dense"
KEEPS = (0.5, 0.25, 0.11)
STRATEGIES = ("diverse", "cdpruner", "stride", "fastv:layer=2")
IMAGE_TOKEN, TEXT_TOKENS, DECODED = 3, 48, 16


def model_of(scale):
    """Return a LLaVA with random weights."""
    size = (64, 2, 56) if scale == "smallest" else (512, 8, 336)
    width, layers, pixels = size
    sizes = {"hidden_size": width, "num_attention_heads": 8, "intermediate_size": 4 * width}
    vision = transformers.CLIPVisionConfig(
        **sizes | {"hidden_size": width // 2, "intermediate_size": width},
        num_hidden_layers=layers,
        image_size=pixels,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2 * layers, vocab_size=1000, max_position_embeddings=2048
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=(pixels // 14) ** 2,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    return model.to(DEVICE, MAIN_DTYPE).eval()


def prompt_of(model):
    """Return one image with a text behind it."""
    tokens, pixels = model.config.image_seq_length, model.config.vision_config.image_size
    ids = torch.full((1, tokens + TEXT_TOKENS), IMAGE_TOKEN, device=DEVICE)
    ids[:, tokens:] = torch.randint(4, 1000, (1, TEXT_TOKENS), device=DEVICE)
    images = torch.randn(1, 3, pixels, pixels, device=DEVICE, dtype=MAIN_DTYPE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


@torch.inference_mode()
def prefill(model, prompt):
    return model(**prompt, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def decode(model, prompt, filled):
    """Add tokens to a copy of the cache."""
    cache, mask = copy.deepcopy(filled), prompt["attention_mask"]
    token, length = prompt["input_ids"][:, -1:], mask.shape[1]
    for i in range(DECODED):
        mask = torch.cat((mask, mask[:, :1]), 1)
        positions = torch.tensor([[length + i]], device=DEVICE)
        cache = cache_of(
            model(input_ids=token, attention_mask=mask, position_ids=positions, **named(cache))
        )
    return cache


@torch.inference_mode()
def generate_step(model, call, prompt, filled):
    """Add tokens to a copy of the cache, with the inputs that `generate` makes, by `call`."""
    cache, mask = copy.deepcopy(filled), prompt["attention_mask"]
    token, length = prompt["input_ids"][:, -1:], mask.shape[1]
    for i in range(DECODED):
        mask = torch.cat((mask, mask[:, :1]), 1)
        inputs = model.prepare_inputs_for_generation(
            token,
            attention_mask=mask,
            position_ids=torch.tensor([[length + i]], device=DEVICE),
            use_cache=True,
            **named(cache),
        )
        logits = call(**inputs).logits
    return logits


def cache_of(output):
    return output["cache"] if "cache" in output else output["past_key_values"]


def named(cache):
    """Return the cache under the name that this transformers gives it."""
    has_new_name = hasattr(transformers.cache_utils.DynamicCache, "get_query_offset")
    return {"cache" if has_new_name else "past_key_values": cache}


def cached_bytes(cache):
    return sum(2 * each.keys.numel() * each.keys.element_size() for each in cache.layers)


def steps(scale):
    """Return strategy and phase of each case, as 'stride-prefill'.

    Strategies before the language model leave a cache of the same size: without `--full`, only
    `stride` of them decodes.
    """
    if scale == "smallest":
        return ["stride-prefill", "stride-decoding"]
    decoding = STRATEGIES if scale == "full" else ("stride", "fastv:layer=2")
    return [f"{name}-prefill" for name in STRATEGIES] + [f"{name}-decoding" for name in decoding]


@pytest.mark.cases(case=steps)
def test_vlm(record, rounds, scale, case):
    strategy, _, phase = case.rpartition("-")
    model = model_of(scale)
    prompt = prompt_of(model)
    models = {DENSE: model}
    for keep in KEEPS if scale == "full" else KEEPS[1:2]:
        models[f"{keep:g}"] = elip_models.reduce_(copy.deepcopy(model), strategy, keep=keep)
    caches = {name: cache_of(prefill(each, prompt)) for name, each in models.items()}
    same = elip_models.reduce_(copy.deepcopy(model), "stride", keep=1.0)
    error = relative_error(prefill(same, prompt).logits, prefill(model, prompt).logits)
    if phase == "prefill":
        steps = {name: partial(prefill, each, prompt) for name, each in models.items()}
    else:
        steps = {name: partial(decode, each, prompt, caches[name]) for name, each in models.items()}
    times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
    ratios = ratios_to(DENSE, times)
    del ratios[DENSE]
    record(
        steps[f"{KEEPS[1]:g}"],
        op="llava",
        direction=phase,
        rounds=rounds,
        language_model=strategy,
        ratios=ratios,
        milliseconds=milliseconds(times),
        parity=check_errors({DENSE: 0.0, "keep=1": error}, ours=["keep=1"]),
        cache_bytes={name: cached_bytes(each) for name, each in caches.items()},
        tokens={"image": model.config.image_seq_length, "text": TEXT_TOKENS, "decoded": DECODED},
        shape={"B": 1, "image": model.config.vision_config.image_size},
        dtype=DTYPE_NAMES[MAIN_DTYPE],
    )


@pytest.mark.cases(strategy=lambda scale: ("diverse", "fastv:layer=2"))
def test_vlm_caches(record, rounds, scale, strategy):
    """Decode with a static cache, as is and compiled, relative to the dynamic cache."""
    model = elip_models.reduce_(model_of(scale), strategy, keep=0.25)
    prompt = prompt_of(model)
    length = prompt["attention_mask"].shape[1] + DECODED
    caches = {
        "dynamic": transformers.DynamicCache(config=model.config),
        "static": transformers.StaticCache(config=model.config, max_cache_len=length),
    }
    with torch.inference_mode():
        for cache in caches.values():
            positions = prompt["attention_mask"].cumsum(1) - 1
            settings = {"is_first_iteration": True, "use_cache": True, "position_ids": positions}
            ids = prompt["input_ids"]
            others = {name: value for name, value in prompt.items() if name != "input_ids"}
            model(
                **model.prepare_inputs_for_generation(ids, **others, **settings, **named(cache)),
                logits_to_keep=1,
            )
    steps = {
        name: partial(generate_step, model, model, prompt, cache) for name, cache in caches.items()
    }
    reason = why_not_compiled()
    if reason is None:
        compiled = torch.compile(model, fullgraph=True)
        steps["compiled"] = partial(generate_step, model, compiled, prompt, caches["static"])
    logits = {name: step() for name, step in steps.items()}
    errors = {name: relative_error(value, logits["dynamic"]) for name, value in logits.items()}
    times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
    record(
        steps["static"],
        op="llava caches",
        direction="decoding",
        rounds=rounds,
        strategy=strategy,
        ratios=ratios_to("dynamic", times),
        milliseconds=milliseconds(times),
        reasons={} if reason is None else {"compiled": reason},
        parity=check_errors(errors, ours=[name for name in steps if name != "dynamic"]),
        tokens={"image": model.config.image_seq_length, "text": TEXT_TOKENS, "decoded": DECODED},
        shape={"B": 1, "image": model.config.vision_config.image_size},
        dtype=DTYPE_NAMES[MAIN_DTYPE],
    )
