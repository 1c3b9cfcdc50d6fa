"""Generation beyond a sliding window, and prompts that are cut into chunks.

What a reduced language model generates is what the stock model generates from the whole prompt with
a mask that hides the removed tokens; or it is refused before the first token.
"""

from contextlib import ExitStack, contextmanager

import torch
import transformers as hf

from elip_models.api import record_stages, reduce_, strategies_in, unreduce_
from elip_models.vlm.families import find_multimodal
from tests.fuzz.harness import Loss, kind, refused
from tests.vlm import oracle
from tests.vlm.configs import CASES, TEXT
from tests.vlm.models import model_of, prompt
from tests.vlm.test_layer_strategies import hidden as hidden_in_layers

STRATEGIES = (
    *("diverse", "diverse:relevance=true", "cdpruner", "visionzip", "pool", "stride"),
    *("evs", "fastv:layer=1", "pyramid:stages=3"),
)
MERGING = ("visionzip", "pool")
"""Strategies whose tokens are no tokens of the stock model; chunks alone are tried."""
FAMILIES = ("llava", "mistral", "gemma3")
ROWS = (((4, "image", 3),), ((4, "image", 3), (2, "image", 6)), ((2, "image", 1, "image", 5),))
CHUNKS = (None, None, 1, 3, 7, 16, 20, 22, 100)


def build(name, window, rows):
    """A model whose attention has this window, and inputs of rows with text and images."""
    torch.manual_seed(0)
    config, pixels = CASES["llava" if name == "mistral" else name]()
    if name == "mistral":
        config.text_config = hf.MistralConfig(**TEXT, sliding_window=window)
    elif name == "gemma3":
        config.text_config.sliding_window = window
    model = model_of(config, "sdpa")
    count = sum(row.count("image") for row in rows)
    pixels = {"pixel_values": pixels["pixel_values"][:count].to(model.dtype)}
    return model, pixels | prompt(model, pixels, rows)


class Count(hf.StoppingCriteria):
    """Count the tokens that `generate` has made."""

    tokens = 0

    def __call__(self, ids, scores, **_):
        self.tokens += 1
        return torch.zeros(len(ids), dtype=torch.bool)


@contextmanager
def within_window(model, window):
    """Limit a mask (B, 1, N, N) of the language model to its window, inside."""

    def limit(module, args, kwargs):
        mask = kwargs["attention_mask"]
        if isinstance(mask, dict):  # which has one for the layers with a window
            return None
        places = torch.arange(mask.shape[-1])
        return args, kwargs | {"attention_mask": mask & (places[:, None] - places < window)}

    language_model = find_multimodal(model).language_model
    handle = language_model.register_forward_pre_hook(limit, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def without_removed(model, inputs, info, strategy, window, tokens):
    """Return what a stock model generates, without a cache, from the tokens that were kept."""
    with ExitStack() as stack:
        stack.enter_context(oracle.hidden(model, info.kept))
        if window is not None:
            stack.enter_context(within_window(model, window))
        if info.kept_behind:
            drops = strategy.drops(len(find_multimodal(model).language_model.layers))
            stack.enter_context(hidden_in_layers(model, drops, info.kept_behind))
        return oracle.stock_generate(model, inputs, max_new_tokens=tokens, use_cache=False)


@kind(share=1, seconds=60)
@torch.no_grad()
def windows(folder, rng):
    name, rows, strategy = rng.choice(FAMILIES), rng.choice(ROWS), rng.choice(STRATEGIES)
    window = None if name == "llava" else rng.choice((24, 26, 32, 40, 64))
    model, inputs = build(name, window, rows)
    keep, tokens, chunk = rng.choice((0.3, 0.5, 3)), rng.choice((2, 8, 24)), rng.choice(CHUNKS)
    if strategy in MERGING:
        chunk = rng.choice([size for size in CHUNKS if size is not None])
    settings = {"max_new_tokens": tokens, "stopping_criteria": [Count()]}
    chunks = {} if chunk is None else {"prefill_chunk_size": chunk}
    words = f"{name}, window {window}, {strategy}, keep {keep}, {rows}, {tokens} tokens, {chunks}"
    try:
        reduce_(model, strategy, keep=keep)
        with record_stages(model) as infos:
            output = oracle.stock_generate(model, inputs, **settings, **chunks)
    except (TypeError, ValueError) as error:
        if made := settings["stopping_criteria"][0].tokens:
            raise Loss(f"{made} tokens are lost: {error}: {words}") from error
        return refused(error, ":")
    (chosen,) = strategies_in(model)
    if chunks:
        try:
            expected = oracle.stock_generate(model, inputs, max_new_tokens=tokens)
        except ValueError as error:
            raise Loss(f"in chunks alone it is not refused: {error}: {words}") from error
    else:
        unreduce_(model)
        expected = without_removed(model, inputs, infos[0], chosen, window, tokens)
    pairs = zip(output.logits, expected.logits, strict=True)
    if other := [i for i, pair in enumerate(pairs) if not oracle.close(*pair)]:
        raise Loss(f"other logits from step {other[0]} on: {words}")
    return "read"
