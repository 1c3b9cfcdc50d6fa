"""What a reduced multimodal language model has to compute: the stock model without some columns.

In the oracle every token runs, and no token attends to those that the reduced model removed. A
hook of the language model changes its attention mask alone. If a layer has no such mask, the oracle
runs the language model on each row alone, without the removed tokens and without a cache.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elip_models import record_stages, reduce_, unreduce_
from elip_models.vlm.families import find_multimodal
from tests.vlm.checks import GAPS
from tests.vlm.configs import IMAGE, VIDEO

CACHE_NAMES = ("cache", "past_key_values")  # the second before transformers 5.24


def hidden(model: nn.Module, kept: Tensor) -> AbstractContextManager[None]:
    """Hide the tokens beside `kept` (B, N) bool, of the first N of each sequence, inside."""
    return (_without if find_multimodal(model).recurrent_layers else _masked)(model, kept)


@contextmanager
def _without(model: nn.Module, kept: Tensor) -> Iterator[None]:
    """Replace the output of the language model by that of each row without removed tokens."""
    seen: dict[str, Tensor] = {}

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
        batch, new = embeds.shape[:2]
        past = 0 if cache is None else cache.get_seq_length() - new
        if positions is None:
            positions = torch.arange(past, past + new)
        positions = positions[-3:] if positions.dim() == 3 else positions
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        if past:
            embeds = torch.cat((seen["embeds"], embeds), 1)
            axes = max(positions.shape[:-2], seen["positions"].shape[:-2])
            pair = (part.expand(*axes, batch, -1) for part in (seen["positions"], positions))
            positions = torch.cat((*pair,), -1)
        seen.update(embeds=embeds, positions=positions)
        mask = kwargs.get("attention_mask")
        hidden = torch.zeros(*embeds.shape[:2], output.last_hidden_state.shape[-1])
        hidden = hidden.to(output.last_hidden_state)
        for row in range(batch):
            stays = torch.ones(embeds.shape[1], dtype=torch.bool)
            width = min(len(stays), kept.shape[1])
            stays[:width] = kept[row * len(kept) // batch, :width]
            alone = {"inputs_embeds": embeds[row : row + 1, stays], "use_cache": False}
            alone["position_ids"] = positions[..., row : row + 1, stays]
            alone["attention_mask"] = None if mask is None else mask[row : row + 1, stays]
            hidden[row, stays] = module.forward(**alone).last_hidden_state[0]
        output["last_hidden_state"] = hidden[:, -new:]
        return output

    language_model = find_multimodal(model).language_model
    handle = language_model.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _masked(model: nn.Module, kept: Tensor) -> Iterator[None]:
    """Hide the columns of removed tokens from attention."""

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
        past = 0 if cache is None else cache.get_seq_length()
        shape = (*kwargs["inputs_embeds"].shape[:2], past)
        mask, types = kwargs.get("attention_mask"), getattr(module.config, "layer_types", None)
        if not isinstance(mask, dict) and types is not None:
            mask = dict.fromkeys(types, mask)
        if isinstance(mask, dict):
            new: Any = {kind: _mask(each, kept, shape, module, kind) for kind, each in mask.items()}
        else:
            new = _mask(mask, kept, shape, module, "sliding_attention")
        return args, kwargs | {"attention_mask": new}

    language_model = find_multimodal(model).language_model
    handle = language_model.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _mask(mask: Tensor | None, kept: Tensor, shape: tuple, module: nn.Module, kind: str) -> Tensor:
    """Return an attention mask (B, 1, T, N) without the columns of removed tokens."""
    batch, new, past = shape
    columns = torch.ones(batch, past + new, dtype=torch.bool)
    width = min(kept.shape[1], past + new)
    columns[:, :width] = kept.repeat_interleave(batch // len(kept), 0)[:, :width]
    if mask is None or mask.dim() == 2:
        seen = _seen(module.config, kind, past, new)
        if mask is not None:
            columns &= mask[:, : past + new].bool()
        mask = (seen & columns[:, None, None]).expand(batch, 1, -1, -1)
        if module.config._attn_implementation == "sdpa":
            return mask
        dtype = next(module.parameters()).dtype
        return torch.zeros((), dtype=dtype).where(mask, torch.finfo(dtype).min)
    value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~columns[:, None, None], value)


def _seen(config: Any, kind: str, past: int, new: int) -> Tensor:
    """Return (T, N) bool, the tokens of a sequence without padding that new ones attend to."""
    rows, columns = torch.arange(past, past + new)[:, None], torch.arange(past + new)
    seen, window = columns <= rows, getattr(config, "sliding_window", None)
    if kind == "sliding_attention" and window is not None:
        seen &= rows - columns < window
    if kind == "chunked_attention":
        seen &= rows // config.attention_chunk_size == columns // config.attention_chunk_size
    return seen


def forward(model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
    """Return the logits of a reduced model, and the tokens (B, N) bool that it kept."""
    with record_stages(model) as infos:
        logits = model(**inputs).logits
    return logits, infos[0].kept


def assert_as_without_removed(model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
    """Compare the logits of a reduced model with the oracle's, which it returns with the tokens
    (B, N) bool that were kept; restore the model."""
    logits, kept = forward(model, inputs)
    unreduce_(model)
    with hidden(model, kept):
        expected = model(**inputs).logits
    read = kept & inputs["attention_mask"].bool()
    assert not kept.all() and close(logits[read], expected[read])
    return expected, kept


def generate(model: nn.Module, inputs: dict, **settings: Any) -> tuple[Any, Tensor]:
    """Return the output of `generate` of a reduced model, and the tokens of the prompt it kept."""
    with record_stages(model) as infos:
        output = stock_generate(model, inputs, **settings)
    return output, infos[0].kept


def stock_generate(model: nn.Module, inputs: dict, **settings: Any) -> Any:
    """Return what `generate` returns, with the logits of the prompt and of five further steps."""
    settings = {"max_new_tokens": 6, "do_sample": False} | settings
    settings["suppress_tokens"] = [IMAGE, VIDEO]
    return model.generate(
        **inputs, **settings, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )


@torch.no_grad()
def assert_unchanged_with_every_token(model: nn.Module, inputs: dict) -> None:
    """Reduce a model such that every token stays; its logits and tokens are the same bits."""
    logits, output = model(**inputs).logits, stock_generate(model, inputs)
    reduce_(model, keep=1.0)
    assert torch.equal(model(**inputs).logits, logits)
    same = stock_generate(model, inputs)
    assert torch.equal(same.sequences, output.sequences)
    assert all(map(torch.equal, same.logits, output.logits))


def skip_gap(check: str, model: nn.Module) -> None:
    """Skip a test of a check in which the model of transformers itself fails."""
    if reason := GAPS.get((check, model.config.model_type)):
        pytest.skip(reason)
    if check == "beams" and "mm_encoder_outputs" not in signature(model.forward).parameters:
        pytest.skip("this version repeats each image, and not each row of images, for the beams")


def close(values: Tensor, expected: Tensor) -> bool:
    """Return whether values differ by at most 1e-6 of the largest in fp32, or 1e-9 in fp64."""
    allowed = {torch.float32: 1e-6, torch.float64: 1e-9}[expected.dtype]
    return bool((values - expected).abs().max() <= allowed * expected.abs().max())


def cache_of(output: Any) -> tuple[str, Any]:
    """Return the key-value cache of an output, with the name that its version gives it."""
    return next((name, output[name]) for name in CACHE_NAMES if output.get(name) is not None)


def next_turn(model: nn.Module, output: Any, before: dict, after: dict) -> Any:
    """Return the output for `after`, which continues the sequences of `before`."""
    length, (batch, new) = before["input_ids"].shape[1], after["input_ids"].shape
    name, cache = cache_of(output)
    mask = torch.cat((before["attention_mask"], after["attention_mask"]), 1)
    positions = torch.arange(length, length + new).expand(batch, -1)
    further = {"attention_mask": mask, "position_ids": positions, name: cache}
    return model(**after | further)
