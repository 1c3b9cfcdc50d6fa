"""The hooks of the language model's layers, where image tokens are removed behind a layer.

A layer before a drop is watched: its keys, and its query of the last token of the question, give
the attention that selects. The hook of the layer behind it removes tokens from the hidden states.
This hook, and those of all later layers, remove them from the masks and rotations, which the
language model makes once for all layers. Each layer's key-value cache thus holds the tokens that
this layer read.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elip_kernels import cls_attention
from elip_models.engine.model_methods import keep_handles
from elip_models.vlm.attention_probe import Watcher, implementation_of, watch
from elip_models.vlm.budget import parts
from elip_models.vlm.cache_state import CacheState, cache_in
from elip_models.vlm.call import InnerCall, PromptCall, current_call
from elip_models.vlm.clips import TokenGroup, groups_of_images
from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import Packing
from elip_models.vlm.prompt_reduction import check_call, reduced_mask
from elip_models.vlm.static_cache import (
    is_static,
    is_static_step,
    pad_to_slots,
    remove_slots,
    step_mask,
)
from elip_models.vlm.strategies.layer_strategy import LayerStrategy
from elip_models.vlm.window_masks import narrowed, widened


class InnerLayers(Watcher):
    """The drops inside one language model."""

    def __init__(self, multimodal: Multimodal, strategy: LayerStrategy) -> None:
        layers = multimodal.language_model.layers
        self.strategy = strategy
        self.drops = strategy.drops(len(layers))
        self.levels = [sum(at <= i for at in self.drops) for i in range(len(layers))]
        self.window, self.longest = multimodal.window, multimodal.longest
        self.config = multimodal.text_config

    @property
    def is_flash(self) -> bool:
        """Return whether attention takes a mask (B, N)."""
        return "flash" in implementation_of(self.config)

    def install(self, multimodal: Multimodal) -> None:
        """Register hooks behind those of `PromptReduction`; watch the layers before the drops."""
        language_model = multimodal.language_model
        layers = language_model.layers
        begin = language_model.register_forward_pre_hook(self.begin, with_kwargs=True)
        end = language_model.register_forward_hook(self.end, with_kwargs=True, prepend=True)
        keep_handles(language_model, self, begin, end)
        for at in self.drops:
            watch(layers[at - 1].self_attn, self)
        for i, (layer, level) in enumerate(zip(layers, self.levels, strict=True)):
            if level:
                hook = LayerHook(self, level, i, is_first=i in self.drops)
                handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
                keep_handles(layer, hook, handle)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward pass of the language model."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or is_static_step(embeds.shape[1], cache_in(kwargs)):
            return
        prompt = current_call()
        if prompt is None or prompt.images is None:
            return
        (batch, length), cache = embeds.shape[:2], cache_in(kwargs)
        past = () if prompt.removed is None else prompt.removed.inside
        if past and length > 1 and prompt.images.any():
            raise ValueError(
                "pixel_values: expected no further images behind a cache from which a strategy "
                "inside the language model removed tokens, got some; begin with an empty cache"
            )
        if not past:
            if length == 1 or not prompt.images.any():
                return
            held = 0 if cache is None else int(cache.get_seq_length())
            past = (CacheState.whole(batch, held, embeds.device),) * (1 + len(self.drops))
            state = past[0].grown(length) if prompt.state is None else prompt.state
            self._check_window(state.length)
        check_call(self.window, self.longest, past[0].length + length, cache)
        _check_checkpointing(model)
        images, packing = prompt.images, Packing.identity(batch, length, embeds.device)
        last = None if prompt.question is None else prompt.question.last
        if prompt.packing is not None:
            images = prompt.packing.rows(images) & prompt.packing.real
            last = prompt.packing.places(prompt.packing.rows(last))
            packing = packing.with_real(prompt.packing.real)
        mask = prompt.mask
        text = None if mask is None else mask[:, : past[0].length + length].bool()
        prompt.inner = InnerCall(images, last, text, past, [packing])
        prompt.levels = tuple(self.levels)

    def _check_window(self, length: int) -> None:
        """Raise ValueError for a prompt of which the question may not attend to every image."""
        if self.window is not None and length > self.window:
            raise ValueError(
                f"input_ids: expected a prompt of at most {self.window} tokens, the window of the "
                f"language model's attention, in which {self.strategy.name!r} selects, got "
                f"{length}; take a strategy before the language model, such as 'diverse'"
            )

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """End it, and return the hidden states to the length of level 0."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or is_static_step(embeds.shape[1], cache_in(kwargs)):
            return None
        prompt = current_call()
        if prompt is None or prompt.inner is None:
            return None
        call = prompt.inner
        prompt.kept_behind = tuple(packing.kept() for packing in call.packings[1:])
        output["last_hidden_state"] = call.packings[-1].scatter(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            levels = (0, *self.levels)  # of the embeddings, and of the output of each layer
            output["hidden_states"] = tuple(
                None if hidden is None else call.packings[level].scatter(hidden)
                for level, hidden in zip(levels, output["hidden_states"], strict=True)
            )
        return output

    def receive(
        self, query: Tensor, key: Tensor, scale: float | None, softcap: float | None
    ) -> None:
        """Store what a watched layer attends with."""
        if query.shape[2] == 1:  # a step of decoding
            return
        prompt = current_call()
        if prompt is not None and prompt.inner is not None:  # no text alone, and no recomputation
            prompt.inner.watched = query, key, scale, softcap

    def select(self, prompt: PromptCall) -> Packing:
        """Return the packing of a new level."""
        call, before = prompt.inner, prompt.inner.packings[-1]
        images, kept = before.rows(call.images) & before.real, before.real.clone()
        further = len(self.drops) - len(call.packings)
        count = partial(self.strategy.count, further=further)
        groups, budget = groups_of_images(images), prompt.budget
        for group, indices, number in parts(groups, count, budget, prompt.sequences):
            part = group.of(indices)
            chosen = prompt.select(partial(self._choose, call, part, number))
            kept[part.rows, part.positions] = False
            kept[part.rows, part.positions.gather(1, chosen)] = True
        return Packing.of(kept)

    def _choose(self, call: InnerCall, group: TokenGroup, number: int) -> Tensor:
        """Return (R, number), the positions in images that the question attends to most."""
        before, (query, key, *settings) = call.packings[-1], call.watched
        rows, positions = group.rows.to(query.device), group.positions.to(query.device)
        ends = before.places(before.rows(call.last)).to(query.device)[rows, positions[:, :1]]
        if bool((ends < positions[:, -1:]).any()):
            raise ValueError(
                "question: expected its last token behind each image, which it attends to for "
                f"{self.strategy.name!r}, got one before; mark a token of text behind the images"
            )
        mask, row = call.attended(len(call.packings) - 1).to(query.device), rows[:, 0]
        past, key = mask.shape[1] - query.shape[2], key[:, :, : mask.shape[1]]
        seen = torch.arange(mask.shape[1], device=mask.device) <= past + ends
        attention = attention_row(query[row, :, ends[:, 0]], key[row], mask[row] & seen, *settings)
        scores = attention.gather(1, past + positions)
        scores[:, -1] = torch.inf  # the last token of an image stays
        return scores.topk(number, dim=1).indices.to(group.positions.device)


class LayerHook:
    """The pre-hook of a layer behind at least one drop.

    level: how many drops come before the layer.
    layer: the index of the layer.
    is_first: the last of them is directly in front.
    """

    def __init__(self, inner: InnerLayers, level: int, layer: int, is_first: bool) -> None:
        self.inner = inner
        self.level = level
        self.layer = layer
        self.is_first = is_first

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove tokens from the layer's arguments."""
        cache = cache_in(kwargs)
        if is_static_step(args[0].shape[1], cache):
            mask = step_mask(kwargs.get("attention_mask"), cache.layers[self.layer])
            return args, kwargs | {"attention_mask": mask}
        prompt = current_call()
        if prompt is None or prompt.inner is None:
            return None
        call = prompt.inner
        if self.is_first and args[0].shape[1] == 1:  # a step of decoding
            call.packings.append(call.packings[-1])
        elif self.is_first:
            later = self.inner.select(prompt)
            call.packings.append(call.packings[-1].then(later))
            args = (later.rows(args[0]), *args[1:])
        packing = call.packings[self.level]
        if is_static(cache):
            missing = packing.length - packing.order.shape[1]
            prompt.slots += remove_slots([cache.layers[self.layer]], missing)
        changes = {
            "attention_mask": lambda mask: self._mask(mask, prompt, cache),
            "position_embeddings": lambda turns: (
                packing.features(turns)  # complex numbers, in Llama 4
                if isinstance(turns, Tensor)
                else tuple(map(packing.features, turns))
            ),
            "position_ids": packing.positions,
            "moe_mm_token_type_ids": packing.rows,
        }
        new = {
            name: call.once(self.level, kwargs.get(name), change)
            for name, change in changes.items()
            if kwargs.get(name) is not None or name == "attention_mask"
        }
        return args, kwargs | new

    def _mask(self, mask: Tensor | None, prompt: PromptCall, cache: Any) -> Tensor | None:
        """Return the mask of this level, with all slots of a static cache."""
        call = prompt.inner
        if prompt.is_windowed:
            packing, past = call.packings[self.level], call.past[self.level]
            mask = reduced_mask(widened(mask, past.length + packing.length), packing, past)
            return narrowed(mask, cache, self.layer)
        if not is_static(cache):
            return self._reduced_mask(mask, call)
        mask = None if mask is None else mask[..., : call.images.shape[1]]
        return pad_to_slots(self._reduced_mask(mask, call), cache.layers[self.layer])

    def _reduced_mask(self, mask: Tensor | None, call: InnerCall) -> Tensor | None:
        """Return the mask of this level, from that of level 0 if the layer was given one."""
        packing, past = call.packings[self.level], call.past[self.level]
        if mask is None:
            if packing.real.all() and past.real.all():
                return None
            is_flash = self.inner.is_flash
            return call.attended(self.level) if is_flash else _causal_mask(call, self.level)
        if mask.shape[-1] == past.length + packing.length:
            return reduced_mask(mask, packing, past)
        new = _causal_mask(call, self.level)
        if not mask.is_floating_point():
            return new
        hidden = torch.finfo(mask.dtype).min
        return torch.zeros_like(new, dtype=mask.dtype).masked_fill(~new, hidden)


def _check_checkpointing(model: nn.Module) -> None:
    """Raise TypeError if the backward pass would run the hooks of layers again, without a call."""
    layer = model.layers[-1]
    is_checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
    if is_checkpointed and type(layer).__call__ is not nn.Module.__call__:
        raise TypeError(
            "strategy: expected one before the language model, such as 'diverse', since "
            "gradient checkpointing of this transformers runs the hooks of layers again, got one "
            "inside it; update transformers, or turn gradient checkpointing off"
        )


def attention_row(
    query: Tensor, key: Tensor, mask: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Return (R, K) the attention, mean over heads, of queries (R, H, d) to keys (R, G, K, d).

    `mask` (R, K) is False for keys that the query does not see.
    """
    if softcap is None:
        return cls_attention(query, key, scale=scale, mask=mask)
    scores = query.unflatten(1, (key.shape[1], -1)) @ key.mT * (scale or query.shape[-1] ** -0.5)
    scores = softcap * (scores.float() / softcap).tanh()
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(-1).mean((1, 2))


def _causal_mask(call: InnerCall, level: int) -> Tensor:
    """Return the mask (B, 1, M, K) bool of a level in which tokens attend to all before them.

    For layers that got no mask, or one that was made for the length of their own cache.
    """
    columns, new = call.columns(level), call.packings[level].order.shape[1]
    rows, columns = columns[:, None, -new:, None], columns[:, None, None]
    return (columns <= rows) & call.attended(level)[:, None, None] | (columns == rows)
