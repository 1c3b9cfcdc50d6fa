"""The hooks of the language model's layers, where image tokens are removed behind a layer.

A layer in front of a drop is watched: its last query and its keys give the attention that selects.
The hook of the layer behind it removes tokens from the hidden states. This hook, and those of all
later layers, remove them from the masks and rotations, which the language model makes once for all
layers. Each layer's key-value cache thus holds the tokens that this layer read.

The sequence that the language model reads is level 0, and each drop begins a level. The layers of a
level share one `Packing` of level 0.
"""

from collections.abc import Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elip_kernels import cls_attention
from elip_models.reduction.model_patches import remove_hooks
from elip_models.vlm.attention_probe import LISTENERS, register_functions, unwatch, watch
from elip_models.vlm.cache_state import CacheState, cache_in, level_states_of, store_level_states
from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import Packing, gather_columns, hide, runs_by_length
from elip_models.vlm.seam import check_call, current_call
from elip_models.vlm.strategies.inside import LayerStrategy, count

INNER: ContextVar["InnerCall | None"] = ContextVar("INNER", default=None)


@dataclass
class InnerCall:
    """One forward pass of the language model.

    images: (B, S) bool, the image tokens of the sequence that it reads.
    text: (B, K) bool, False for padding of the text among all cached and new tokens, or None.
    past: what the cache of each level held before.
    packings: the packing of each level that the forward pass has reached.
    row: (B, K) the attention of the last token in the watched layer that ran last.
    tokens: what ends this call in its context variables.
    """

    images: Tensor
    text: Tensor | None
    past: tuple[CacheState, ...]
    packings: list[Packing]
    row: Tensor | None = None
    tokens: list[Token] = field(default_factory=list)

    def states(self) -> tuple[CacheState, ...]:
        """Return what the cache of each level holds after the forward pass."""
        length = self.images.shape[1]
        return tuple(
            past.extended(packing.order, packing.real, length)
            for past, packing in zip(self.past, self.packings, strict=True)
        )

    def whole(self, hidden: Tensor) -> Tensor:
        """Return hidden states of any level at the length of level 0, with zeros between."""
        width = hidden.shape[1]
        fitting = (each for each in self.packings if each.order.shape[1] == width)
        return hidden if width == self.images.shape[1] else next(fitting).scatter(hidden)

    def attended(self, level: int) -> Tensor:
        """Return (B, K) bool, which cached and new tokens of a level are no padding."""
        packing, past = self.packings[level], self.past[level]
        real = torch.cat((past.real, packing.real), 1)
        if self.text is None:
            return real
        return real & self.text.gather(1, self.columns(level))

    def columns(self, level: int) -> Tensor:
        """Return (B, K), the positions of the cached and new tokens of a level at level 0."""
        packing, past = self.packings[level], self.past[level]
        return torch.cat((past.columns, packing.order + past.length), 1)

    def listen(self, module: nn.Module, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Store the attention of the last token, from the queries and keys of a watched layer."""
        level = len(self.packings) - 1
        mask, new = self.attended(level), self.packings[level].real.shape[1]
        last = new - 1 - mask[:, -new:].flip(1).to(torch.uint8).argmax(1)
        rows = torch.arange(len(mask), device=mask.device)
        query, key = query.detach()[rows, :, last], key.detach()
        self.row = cls_attention(query, key, scale=scale, mask=mask)


class InnerLayers:
    """The drops inside one language model."""

    def __init__(self, multimodal: Multimodal, strategy: LayerStrategy) -> None:
        layers = multimodal.language_model.layers
        self.strategy = strategy
        self.drops = strategy.drops(len(layers))
        self.window = multimodal.window
        self.is_flash = "flash" in (multimodal.text_config._attn_implementation or "")
        first = min((at for at, _ in self.drops), default=len(layers))
        if not 0 < first < len(layers):
            raise ValueError(
                f"strategy: expected a drop behind one of the first {len(layers) - 1} layers of "
                f"{len(layers)}, got {strategy}"
            )
        deepstack = len(getattr(multimodal.tower, "deepstack_visual_indexes", ()))
        if first < deepstack:
            raise ValueError(
                f"strategy: expected the first drop behind layer {deepstack} or later, since the "
                f"layers before it add features to every image token, got {strategy}"
            )

    def install(self, multimodal: Multimodal) -> None:
        """Register the hooks behind those of `Seam`, and watch the layers in front of the drops."""
        language_model = multimodal.language_model
        layers = language_model.layers
        language_model.register_forward_pre_hook(self.begin, with_kwargs=True)
        language_model.register_forward_hook(self.end, with_kwargs=True, prepend=True)
        for at, _ in self.drops:
            watch(layers[at - 1].self_attn)
        for i, layer in enumerate(layers):
            level = sum(at <= i for at, _ in self.drops)
            if level:
                is_first = any(at == i for at, _ in self.drops)
                layer.register_forward_pre_hook(LayerHook(self, level, is_first), with_kwargs=True)

    @staticmethod
    def uninstall(multimodal: Multimodal) -> None:
        """Undo `install`."""
        remove_hooks(multimodal.language_model, InnerLayers)
        for layer in multimodal.language_model.layers:
            remove_hooks(layer, LayerHook)
            unwatch(layer.self_attn, multimodal.text_config)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward pass of the language model."""
        register_functions()
        prompt, embeds = current_call(), kwargs.get("inputs_embeds")
        if prompt is None or prompt.images is None or embeds is None:
            return
        (batch, length), cache = embeds.shape[:2], cache_in(kwargs)
        past = level_states_of(cache)
        if past is not None and length > 1 and prompt.images.any():
            raise ValueError(
                "pixel_values: expected no further images behind a cache from which a strategy "
                "inside the language model removed tokens, got some; begin with an empty cache"
            )
        if past is None:
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
        call = InnerCall(images, text, past, [packing])
        call.tokens = [INNER.set(call), LISTENERS.set((*LISTENERS.get(), call.listen))]

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """End it, and return the hidden states to the length of level 0."""
        call = INNER.get()
        if call is None:
            return None
        inner, listeners = call.tokens
        INNER.reset(inner)
        LISTENERS.reset(listeners)
        cache = cache_in(output)
        if cache is not None:
            store_level_states(cache, call.states())
        current_call().kept_behind = tuple(each.kept() for each in call.packings[1:])
        output["last_hidden_state"] = call.whole(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(map(call.whole, output["hidden_states"]))
        return output

    def select(self, call: InnerCall, share: float) -> Packing:
        """Return the packing of a new level, whose images keep a share of their tokens."""
        before = call.packings[-1]
        images = before.rows(call.images) & before.real
        kept, width = before.real.clone(), images.shape[1]
        for rows, positions in runs_by_length(images):
            number = count(positions.shape[1], share)
            scores = call.row[:, -width:][rows, positions]
            scores[:, -1] = torch.inf  # the last token of an image stays
            chosen = positions.gather(1, scores.topk(number, dim=1).indices)
            kept[rows, positions] = False
            kept[rows, chosen] = True
        return Packing.of(kept)


class LayerHook:
    """The pre-hook of a layer behind at least one drop.

    level: how many drops are in front of the layer.
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
        call = INNER.get()
        if call is None:
            return None
        if self.is_first:
            later = self.inner.select(call, self.inner.drops[self.level - 1][1])
            call.packings.append(call.packings[-1].then(later))
            args = (later.rows(args[0]), *args[1:])
        return args, kwargs | dict(self._changed(kwargs, call))

    def _changed(self, kwargs: dict[str, Any], call: InnerCall) -> Iterator[tuple[str, Any]]:
        """Yield the arguments of the layer that depend on the sequence."""
        packing, past = call.packings[self.level], call.past[self.level]
        mask = kwargs.get("attention_mask")
        if mask is not None:
            is_whole = mask.shape[-1] == past.length + packing.length
            new = _mask(mask, packing, past) if is_whole else _causal_mask(call, self.level)
            if not is_whole and mask.is_floating_point():
                new = torch.zeros_like(new, dtype=mask.dtype).masked_fill(
                    ~new, torch.finfo(mask.dtype).min
                )
            yield "attention_mask", new
        elif not (packing.real.all() and past.real.all()):
            is_flash = self.inner.is_flash
            yield (
                "attention_mask",
                call.attended(self.level) if is_flash else _causal_mask(call, self.level),
            )
        if kwargs.get("position_embeddings") is not None:
            yield "position_embeddings", tuple(map(packing.features, kwargs["position_embeddings"]))
        if kwargs.get("position_ids") is not None:
            yield "position_ids", packing.positions(kwargs["position_ids"])


def _check_checkpointing(model: nn.Module) -> None:
    """Raise TypeError if the backward pass would run the hooks of layers again, without a call."""
    layer = model.layers[-1]
    is_checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
    if is_checkpointed and type(layer).__call__ is not nn.Module.__call__:
        raise TypeError(
            "strategy: expected one in front of the language model, such as 'diverse', since "
            "gradient checkpointing of this transformers runs the hooks of layers again, got one "
            "inside it; update transformers, or turn gradient checkpointing off"
        )


def _mask(mask: Tensor, packing: Packing, past: CacheState) -> Tensor:
    """Return the attention mask of a level from that of level 0, (B, K) or (B, 1, S, K)."""
    mask = mask.expand(len(packing.order), *mask.shape[1:])
    before = gather_columns(mask[..., : past.length], past.columns)
    after = gather_columns(mask[..., past.length :], packing.order)
    mask = torch.cat((hide(before, ~past.real), hide(after, ~packing.real)), -1)
    if mask.dim() == 2:
        return mask
    rows = packing.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
    return mask.gather(2, rows)


def _causal_mask(call: InnerCall, level: int) -> Tensor:
    """Return the mask (B, 1, M, K) bool of a level in which tokens attend to all before them.

    For layers that got no mask, or one that was made for the length of their own cache.
    """
    columns, new = call.columns(level), call.packings[level].order.shape[1]
    rows, columns = columns[:, None, -new:, None], columns[:, None, None]
    return (columns <= rows) & call.attended(level)[:, None, None] | (columns == rows)
