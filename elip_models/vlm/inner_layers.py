"""The hooks of the language model's layers, where image tokens are removed behind a layer.

A layer before a drop is watched: its last query and its keys give the attention that selects.
The hook of the layer behind it removes tokens from the hidden states. This hook, and those of all
later layers, remove them from the masks and rotations, which the language model makes once for all
layers. Each layer's key-value cache thus holds the tokens that this layer read.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elip_kernels import cls_attention
from elip_models.reduction.model_patches import remove_hooks
from elip_models.vlm.attention_probe import Watcher, unwatch, watch
from elip_models.vlm.cache_state import CacheState, cache_in
from elip_models.vlm.call import InnerCall, current_call
from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import Packing, runs_by_length
from elip_models.vlm.prompt_reduction import check_call, reduced_mask
from elip_models.vlm.strategies.base import count_kept
from elip_models.vlm.strategies.layer_strategy import LayerStrategy


class InnerLayers(Watcher):
    """The drops inside one language model."""

    def __init__(self, multimodal: Multimodal, strategy: LayerStrategy) -> None:
        layers = multimodal.language_model.layers
        self.strategy = strategy
        self.drops = strategy.drops(len(layers))
        self.levels = [sum(at <= i for at, _ in self.drops) for i in range(len(layers))]
        self.window = multimodal.window
        self.is_flash = "flash" in (multimodal.text_config._attn_implementation or "")

    def install(self, multimodal: Multimodal) -> None:
        """Register hooks behind those of `PromptReduction`; watch the layers before the drops."""
        language_model = multimodal.language_model
        layers = language_model.layers
        language_model.register_forward_pre_hook(self.begin, with_kwargs=True)
        language_model.register_forward_hook(self.end, with_kwargs=True, prepend=True)
        for at, _ in self.drops:
            watch(layers[at - 1].self_attn, self)
        for i, (layer, level) in enumerate(zip(layers, self.levels, strict=True)):
            if level:
                is_first = any(at == i for at, _ in self.drops)
                layer.register_forward_pre_hook(LayerHook(self, level, is_first), with_kwargs=True)

    @staticmethod
    def uninstall(multimodal: Multimodal) -> None:
        """Undo `install`."""
        remove_hooks(multimodal.language_model, InnerLayers)
        for layer in multimodal.language_model.layers:
            remove_hooks(layer, LayerHook)
            unwatch(getattr(layer, "self_attn", layer))  # there may be cross-attention instead

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward pass of the language model."""
        prompt, embeds = current_call(), kwargs.get("inputs_embeds")
        if prompt is None or prompt.images is None or embeds is None:
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
            held = 0 if cache is None else cache.get_seq_length()
            past = (CacheState.whole(batch, held, embeds.device),) * (1 + len(self.drops))
        check_call(self.window, past[0].length + length, cache)
        _check_checkpointing(model)
        images, packing = prompt.images, Packing.identity(batch, length, embeds.device)
        if prompt.packing is not None:
            images = prompt.packing.rows(images) & prompt.packing.real
            packing = packing.with_real(prompt.packing.real)
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:  # the model made masks of it before
            mask = prompt.mask if prompt.state is None else None
        text = None if mask is None else mask[:, : past[0].length + length].bool()
        prompt.inner = InnerCall(images, text, past, [packing])

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """End it, and return the hidden states to the length of level 0."""
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

    def receive(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Store the attention of the last token in a watched layer."""
        prompt = current_call()
        if prompt is None or prompt.inner is None:  # a text alone, or a recomputation
            return
        call = prompt.inner
        level = len(call.packings) - 1
        mask, new = call.attended(level), query.shape[2]
        last = new - 1 - mask[:, -new:].flip(1).to(torch.uint8).argmax(1)
        rows = torch.arange(len(mask), device=mask.device)
        call.row = cls_attention(query[rows, :, last], key, scale=scale, mask=mask)

    def select(self, call: InnerCall, keep: float | int) -> Packing:
        """Return the packing of a new level, whose images keep a share or a number of tokens."""
        before = call.packings[-1]
        images = before.rows(call.images) & before.real
        kept, width = before.real.clone(), images.shape[1]
        for rows, positions in runs_by_length(images):
            number = count_kept(positions.shape[1], keep)
            scores = call.row[:, -width:][rows, positions]
            scores[:, -1] = torch.inf  # the last token of an image stays
            chosen = positions.gather(1, scores.topk(number, dim=1).indices)
            kept[rows, positions] = False
            kept[rows, chosen] = True
        return Packing.of(kept)


class LayerHook:
    """The pre-hook of a layer behind at least one drop.

    level: how many drops come before the layer.
    is_first: the last of them is directly in front.
    """

    def __init__(self, inner: InnerLayers, level: int, is_first: bool) -> None:
        self.inner = inner
        self.level = level
        self.is_first = is_first

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove tokens from the layer's arguments."""
        prompt = current_call()
        if prompt is None or prompt.inner is None:
            return None
        call = prompt.inner
        if self.is_first:
            later = self.inner.select(call, self.inner.drops[self.level - 1][1])
            call.packings.append(call.packings[-1].then(later))
            args = (later.rows(args[0]), *args[1:])
        packing = call.packings[self.level]
        changes = {
            "attention_mask": lambda mask: self._mask(mask, call),
            "position_embeddings": lambda pair: tuple(map(packing.features, pair)),
            "position_ids": packing.positions,
        }
        new = {
            name: call.once(self.level, kwargs.get(name), change)
            for name, change in changes.items()
            if kwargs.get(name) is not None or name == "attention_mask"
        }
        return args, kwargs | new

    def _mask(self, mask: Tensor | None, call: InnerCall) -> Tensor | None:
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


def _causal_mask(call: InnerCall, level: int) -> Tensor:
    """Return the mask (B, 1, M, K) bool of a level in which tokens attend to all before them.

    For layers that got no mask, or one that was made for the length of their own cache.
    """
    columns, new = call.columns(level), call.packings[level].order.shape[1]
    rows, columns = columns[:, None, -new:, None], columns[:, None, None]
    return (columns <= rows) & call.attended(level)[:, None, None] | (columns == rows)
