"""The removal of image tokens from a prompt, between the image features and the language model.

Hooks of stock modules remove them. A hook of the multimodal model finds the image tokens in its
input. Before the language model runs, a strategy selects image tokens. The others are removed from
the embeddings, positions and masks; the remaining tokens keep their positions. Afterwards the
hidden states get the whole length again, with zeros for removed tokens, as labels need.

The result is that of a model in which no token attends to the removed ones: the tests compare the
two. The last token of each image stays, because the token behind it is predicted from it.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from elip_models.call_context import records_of
from elip_models.engine.model_methods import keep_handles
from elip_models.vlm.budget import budget_of, parts
from elip_models.vlm.cache_length import removed_from, show_full_length, show_held_length
from elip_models.vlm.cache_state import CacheState, cache_in, return_slots
from elip_models.vlm.call import PromptCall, begin_call, current_call, end_call
from elip_models.vlm.clips import TokenGroup, VideoLayout, groups_of_images
from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import Packing, gather_columns, hide
from elip_models.vlm.question import (
    IGNORED,
    Question,
    forget_prediction,
    is_known,
    note_prediction,
    prediction,
)
from elip_models.vlm.retrieval import RetrievalHead, retrieval_call
from elip_models.vlm.selections import Selections
from elip_models.vlm.static_cache import (
    has_reduced_slots,
    has_slots,
    is_static,
    is_static_step,
    pad_to_slots,
    padding_of,
    remove_slots,
    show_static_length,
    step_arguments,
)
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy, LanguageStrategy
from elip_models.vlm.strategies.dedup import Dedup
from elip_models.vlm.strategies.layer_strategy import LayerStrategy
from elip_models.vlm.tower_attention import attention_in, tower_attention
from elip_models.vlm.window_masks import filled, narrowed_by_type, whole_masks

OF_EACH_TOKEN = ("per_layer_inputs", "moe_mm_token_type_ids")
"""Further arguments (B, N, ..) of language models: of Gemma 3n and 4, and of ERNIE 4.5."""

CUT = (
    "input_ids: expected a token of text before the image, in a call that continues a cache, got "
    "image tokens at its beginning, as prefill_chunk_size cuts them; pass the prompt at once, or a "
    "token of text with the image"
)


class PromptReduction:
    """The hooks that reduce one multimodal language model, and the strategies they use."""

    def __init__(
        self,
        multimodal: Multimodal,
        strategy: ImageTokenStrategy | Dedup | None,
        inside: LayerStrategy | None = None,
    ) -> None:
        self.strategy = strategy
        self.inside = inside
        self.of_head: list[RemovableHandle] = []
        self.placeholder_ids = multimodal.placeholder_ids
        self.window, self.longest = multimodal.window, multimodal.longest
        self.config = multimodal.text_config
        self.is_recurrent = bool(multimodal.recurrent_layers)
        self.layout = _layout_for(strategy, multimodal)

    @property
    def strategies(self) -> list[LanguageStrategy]:
        """Return those before the language model and inside it."""
        return [strategy for strategy in (self.strategy, self.inside) if strategy is not None]

    def install(self, multimodal: Multimodal) -> None:
        """Register the hooks."""
        model, language_model = multimodal.model, multimodal.language_model
        if (
            head := multimodal.head
        ) is not None:  # first: it may be `model`, and `begin` reads them
            forget = self.forget_labels
            self.of_head = [
                head.register_forward_pre_hook(self.note_labels, with_kwargs=True),
                head.register_forward_hook(forget, with_kwargs=True, always_call=True),
            ]
        if multimodal.embedder is not None:
            self.of_head += RetrievalHead().install(multimodal.embedder)
        begin = model.register_forward_pre_hook(self.begin, with_kwargs=True)
        end = model.register_forward_hook(self.end, with_kwargs=True, always_call=True)
        keep_handles(model, self, begin, end)
        remove = language_model.register_forward_pre_hook(self.remove, with_kwargs=True)
        restore = language_model.register_forward_hook(self.restore, with_kwargs=True)
        keep_handles(language_model, self, remove, restore)

    def note_labels(self, head: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the labels of the loss that will be computed, or that there are none."""
        if not _is_static_step(args, kwargs):
            note_prediction(kwargs)

    def forget_labels(self, head: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forget the labels."""
        if not _is_static_step(args, kwargs):
            forget_prediction()

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the image tokens of a forward pass of the multimodal model."""
        if _is_static_step(args, kwargs):
            return
        call = begin_call(self)
        _refuse_packed(kwargs)
        _refuse_static_turn(cache_in(kwargs))
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None and (retrieval := retrieval_call(model)) is not None:
            ids = retrieval.ids
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        call.images = tokens_of(model, ids, embeds, self.placeholder_ids)
        strategies = self.strategies
        call.is_croppable = is_known(self) or not any(s.reads_question for s in strategies)
        if call.images is None:
            return
        if is_part(kwargs.get("mm_encoder_outputs")):
            self._refuse_chunk(call.images)
        call.sequences = call.images if ids is None else ids
        if ids is None:
            _refuse_unknown(call.images)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            call.mask = _fitted(mask, call.images.shape[1], cache_in(kwargs))
        elif is_static(cache_in(kwargs)):
            call.mask = padding_of(mask, call.images.shape[1])
        if call.images.shape[1] == 1 or not call.images.any():
            return
        if self.layout is not None:
            call.videos = tokens_of(model, ids, embeds, (self.layout.token_id,))
            call.clip_lengths = self.layout.clip_lengths(kwargs)
        call.tower = attention_in(kwargs.get("mm_encoder_outputs"))
        call.question = Question.of(self, call.images, call.mask)
        has_rate = self.strategy is not None and self.strategy.keep is not None
        call.budget = None if has_rate else budget_of(self)
        if cache_in(kwargs) is None:
            call.selections = Selections.of(self, ids, kwargs.get("mm_encoder_outputs"))

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forget the forward pass."""
        if _is_static_step(args, kwargs):
            return
        call = current_call()
        if call is not None and call.removed is not None and removed_from(call.cache) is None:
            show_full_length(call.cache, call.removed)  # the language model raised an error
        for layer, number in [] if call is None else call.slots:  # the same in a static cache
            return_slots(layer, number)
        end_call()

    def remove(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove tokens from what the language model reads."""
        if _is_static_step(args, kwargs):
            return args, step_arguments(kwargs)
        call = current_call()
        embeds = kwargs.get("inputs_embeds")
        if call is None or call.images is None or embeds is None:
            return None
        call.cache = cache_in(kwargs)
        call.removed = removed_from(call.cache)
        past = None if call.removed is None else call.removed.before
        selected = self._select(embeds, call, kwargs.get("position_ids"))
        cached = 0 if call.cache is None else int(call.cache.get_seq_length())
        length = embeds.shape[1]
        is_longer = self.window is not None and cached + length > self.window
        if selected is None and past is None and not (is_longer and call.removed is not None):
            if call.cache is not None:
                show_held_length(call.cache)
            return None
        if past is None:
            past = CacheState.whole(len(embeds), cached, embeds.device)
        if self.is_recurrent:
            _refuse_static(call.cache, kwargs.get("attention_mask"))
        check_call(self.window, self.longest, past.length + length, call.cache)
        if is_longer:
            mask = kwargs.get("attention_mask")
            mask = call.mask if isinstance(mask, Tensor) and mask.dim() == 2 else mask
            masks = whole_masks(self.config, embeds, mask, call.cache, past.length + length)
            kwargs, call.is_windowed = kwargs | {"attention_mask": masks}, True
        if call.cache is not None:
            show_held_length(call.cache)
        if selected is None:
            call.state = past.grown(length)
        else:
            embeds, call.kept = selected
            _check_labels(call.kept)
            call.packing = Packing.of(call.kept)
            if self.is_recurrent and past.length:
                _refuse_gaps(call.packing)
            call.state = past.extended(call.packing.order, call.packing.real, length)
        new, call.state = _reduced_arguments(kwargs, embeds, call, past)
        if is_longer:
            types = getattr(self.config, "layer_types", None)
            if self.inside is not None and types is not None:
                types = types[: self.inside.drops(len(types))[0]]
            masks = narrowed_by_type(new["attention_mask"], call.cache, types)
            new["attention_mask"] = masks
        return args, new

    def restore(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return hidden states to the length of the whole sequence."""
        if _is_static_step(args, kwargs):
            return None
        call = current_call()
        if call is None or call.images is None:
            return None
        cache = cache_in(output) or call.cache
        for kept in call.whole_kept_behind()[-1:]:
            _check_labels(kept)
        is_shorter = call.packing is not None or call.kept_behind
        if is_shorter and output.get("router_logits") is not None:
            raise ValueError(
                "output_router_logits: expected False for a reduced model, whose load-balancing "
                "loss would count removed tokens, got True; leave it out"
            )
        for infos in records_of(self):
            infos.append(call.info(cache))
        if cache is not None and (removed := call.removed_afterwards()) is not None:
            if is_static(cache):
                call.slots.clear()
                show_static_length(cache, removed.length, call.attended_afterwards(cache))
            else:
                show_full_length(cache, removed)
        if call.packing is not None:
            scatter = call.packing.scatter
            output["last_hidden_state"] = scatter(output["last_hidden_state"])
            if output.get("hidden_states") is not None:
                output["hidden_states"] = tuple(
                    None if hidden is None else scatter(hidden)
                    for hidden in output["hidden_states"]
                )
        if (retrieval := retrieval_call(model)) is not None:
            info = call.info(None)
            kept = (info.kept, *info.kept_behind)[-1]
            hidden = retrieval.mark_removed(output["last_hidden_state"], kept)
            output["last_hidden_state"] = hidden
            if output.get("hidden_states") is not None:
                output["hidden_states"] = (*output["hidden_states"][:-1], hidden)
        return output

    def _select(
        self, embeds: Tensor, call: PromptCall, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return embeddings and (B, N) bool, the tokens to keep; None to keep all."""
        images = call.images
        if self.strategy is None or call.question is None:  # no image
            return None
        if isinstance(self.strategy, Dedup):  # its patches have features of zeros
            kept = ~images | embeds.any(-1)
            return None if kept.all() else (embeds, kept)
        kept = torch.ones_like(images)
        is_shorter, budget = False, budget_of(self)
        keep = None if budget is not None else self.strategy.keep
        keeps_all = isinstance(keep, float) and keep == 1.0
        groups = self._groups(call, position_ids)
        for group, indices, number in parts(groups, self.strategy.count, budget, call.sequences):
            if not keeps_all:
                _refuse_cut(group.positions, call.cache)
            if number == group.length:
                continue
            is_shorter = True
            chosen, values = call.select(
                partial(self._reduce, embeds, call, group, indices, number)
            )
            rows, positions, *_ = group.of(indices)
            kept[rows, positions] = False
            positions = positions.gather(1, chosen)
            kept[rows, positions] = True
            if values is not None:
                embeds = embeds.index_put((rows, positions), values.to(embeds.dtype))
        return (embeds, kept) if is_shorter else None

    def _refuse_chunk(self, images: Tensor) -> None:
        """Raise ValueError if a selection needs more than a chunk with images (B, N)."""
        budget = budget_of(self)
        reasons = {s.name: s.why_whole for s in self.strategies if s.why_whole is not None}
        if self.layout is not None and self.layout.are_frames_apart:
            reasons[self.strategy.name] = "selects from all frames of a clip"
        if budget is not None and not isinstance(budget.keep, float | int):
            reasons["budget"] = "is shared by all images of a prompt"
        for name, reason in reasons.items():
            raise ValueError(
                f"prefill_chunk_size: expected None for {name!r}, which {reason}, got a chunk of "
                "the prompt; leave prefill_chunk_size out, or take a strategy that reads one image "
                "alone, such as 'diverse'"
            )
        if images.shape[1] == 1 and getattr(self.strategy, "keep", None) != 1.0:
            raise ValueError(CUT)

    def _groups(self, call: PromptCall, position_ids: Tensor | None) -> Iterator[TokenGroup]:
        """Yield the tokens from which the strategy selects."""
        if self.layout is None:
            yield from groups_of_images(call.images)
            return
        if not self.strategy.reads_frames:
            yield from groups_of_images(call.images & ~call.videos)
        yield from self.layout.clips(call.videos, call.clip_lengths, position_ids)

    def _reduce(
        self, embeds: Tensor, call: PromptCall, group: TokenGroup, indices: list[int], number: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `ImageTokenStrategy.reduce` does for some images of a group."""
        context, part = self._context(embeds, call, group).of(indices), group.of(indices)
        return self.strategy.reduce(embeds[part.rows, part.positions], number, context)

    def _context(self, embeds: Tensor, call: PromptCall, group: TokenGroup) -> ImageContext:
        """Return what the strategy reads beside the tokens of the images."""
        context = ImageContext(frame=group.frame, always=group.always)
        if self.strategy.reads_question:
            starts = group.positions[:, 0]
            question = call.question.means(embeds, group.rows[:, 0], starts)
            context = context._replace(question=question)
        if self.strategy.reads_tower:
            attention, keys = tower_attention(group.rows[:, 0], group.length)
            context = context._replace(attention=attention, keys=keys)
        return context


def check_call(window: int | None, longest: int | None, length: int, cache: Any) -> None:
    """Raise an error for a call whose result would not be that of the tokens that stay.

    `length` is that of the whole sequences, with the tokens in the cache.
    """
    if longest is not None and length > longest:
        raise ValueError(
            f"input_ids: expected at most {longest} tokens, behind which the language model "
            f"changes the temperature of its attention by the number of tokens in the cache, got "
            f"{length}; call unreduce_ for longer sequences"
        )
    if not is_static(cache):
        return
    if not hasattr(cache.layers[0], "cumulative_length"):
        raise TypeError(
            "cache: expected a dynamic cache, since the static ones of this transformers do not "
            f"count their tokens, got {type(cache).__name__}; update transformers, or call "
            "generate without cache_implementation"
        )
    if int(cache.get_seq_length()):
        raise ValueError(
            "cache: expected an empty static cache for a prompt with images, got one with tokens; "
            "pass the prompt at once, or call generate without cache_implementation"
        )
    slots = max(layer.max_cache_len for layer in cache.layers if has_slots(layer))
    if window is not None and slots >= window:
        raise ValueError(
            f"cache: expected a static cache shorter than {window} tokens, the window of the "
            f"language model's attention, got {slots}; call generate without "
            "cache_implementation"
        )


def _reduced_arguments(
    kwargs: dict[str, Any], embeds: Tensor, call: PromptCall, past: CacheState
) -> tuple[dict[str, Any], CacheState]:
    """Return the arguments of the language model for the tokens that remain, and its state."""
    packing, state = call.packing, call.state
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        if any(isinstance(whole, Tensor) and whole.dim() == 4 for whole in mask.values()):
            mask = filled(mask, embeds, past.length + embeds.shape[1])
        elif any(whole is None for whole in mask.values()):
            mask = None  # plain causal attention, whose masks the language model makes itself
    if call.mask is not None:
        call.mask = _mask(call.mask, packing, past, embeds)
    if isinstance(mask, dict):
        mask = {kind: _mask(whole, packing, past, embeds) for kind, whole in mask.items()}
    elif call.mask is not None and (mask is None or mask.dim() == 2):
        mask = call.mask
    else:
        mask = _mask(mask, packing, past, embeds)
    if is_static(call.cache):
        missing = packing.length - packing.order.shape[1]
        call.slots += remove_slots(call.cache.layers, missing)
        mask = pad_to_slots(mask, call.cache.layers[0])
    text = mask if isinstance(mask, Tensor) and mask.dim() == 2 else call.mask
    if text is not None and embeds.shape[1] > 1:
        state = replace(state, mask=text[:, : state.columns.shape[1]])
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + past.length
    new = kwargs | {"attention_mask": mask, "position_ids": positions}
    if packing is not None:
        new["inputs_embeds"] = packing.rows(embeds)
        new["position_ids"] = packing.positions(positions)
        for name in OF_EACH_TOKEN:
            if kwargs.get(name) is not None:
                new[name] = packing.rows(kwargs[name])
    if kwargs.get("cache_position") is not None:
        width = new["inputs_embeds"].shape[1]
        new["cache_position"] = torch.arange(width, device=embeds.device) + past.held
    if packing is not None and kwargs.get("visual_pos_masks") is not None:
        new |= _reduced_deepstack(kwargs, packing)
    return new, state


def _is_static_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of the model is a step behind a reduced prompt in a static cache."""
    ids = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    return tokens is not None and is_static_step(tokens.shape[1], cache_in(kwargs))


def _reduced_deepstack(kwargs: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """Return what Qwen3-VL adds to image tokens in its first layers, for those that remain."""
    visual = kwargs["visual_pos_masks"]
    stays = torch.zeros_like(visual).scatter(1, packing.order, packing.real)[visual]
    features = [layer[stays] for layer in kwargs["deepstack_visual_embeds"]]
    visual = packing.rows(visual) & packing.real
    return {"visual_pos_masks": visual, "deepstack_visual_embeds": features}


def _mask(mask: Tensor | None, packing: Packing | None, past: CacheState, embeds: Tensor) -> Tensor:
    """Return `reduced_mask` for the new tokens `embeds` (B, T, D); None is a mask of ones."""
    batch, new = embeds.shape[:2]
    if mask is None:
        mask = past.columns.new_ones(batch, past.length + new)
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask: expected a tensor, got {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa'"
        )
    if mask.dim() == 2 and new == 1 and past.mask is not None:
        return torch.cat((past.mask, mask[:, past.start :]), 1)
    return reduced_mask(mask, packing, past)


def reduced_mask(mask: Tensor, packing: Packing | None, past: CacheState) -> Tensor:
    """Return the attention mask of the tokens that remain and of those in the cache.

    Args:
        mask: of the whole sequences, (B, N) or (B, 1, T, N).
        packing: which of the new tokens remain; None if all.
        past: the state of the cache.
    """
    before = hide(past.gather(mask), F.pad(~past.real, (0, past.length - past.start)))
    after = mask[..., past.length :].expand(len(before), *mask.shape[1:-1], -1)
    if packing is not None:
        after = hide(gather_columns(after, packing.order), ~packing.real)
    mask = torch.cat((before, after), -1)
    if mask.dim() == 2 or packing is None:
        return mask
    rows = packing.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
    return mask.gather(2, rows)


def _layout_for(
    strategy: ImageTokenStrategy | Dedup | None, multimodal: Multimodal
) -> VideoLayout | None:
    """Return the layout of videos if the strategy needs it."""
    if strategy is None or not strategy.joins_frames:
        return None
    layout = VideoLayout.of(multimodal)
    if strategy.reads_frames or (layout is not None and layout.are_frames_apart):
        return layout
    return None  # a clip without text between frames is a run like an image


def tokens_of(
    model: nn.Module, ids: Tensor | None, embeds: Tensor | None, values: tuple[int, ...]
) -> Tensor | None:
    """Return (B, N) bool, which tokens are `values`, or None without ids and embeddings."""
    if ids is not None:
        return torch.isin(ids, ids.new_tensor(values))
    return None if embeds is None else _placeholders(model, embeds, values)  # of generate


def _placeholders(model: nn.Module, embeds: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return (B, N) bool, which embeddings (B, N, D) are those of `ids`, if the model has these."""
    config = model.config.get_text_config()
    words = config.vocab_size + getattr(config, "additional_vocab_size", 0)  # of Molmo 2
    known = torch.tensor([i for i in ids if i < words], device=embeds.device, dtype=torch.long)
    rows = model.get_input_embeddings()(known)
    return (embeds.unsqueeze(-2) == rows).all(-1).any(-1)


def _check_labels(kept: Tensor) -> None:
    """Raise ValueError if a removed token would have to predict the label of the next one."""
    labels = prediction().labels
    if labels is None or labels.shape != kept.shape:
        return
    if bool(((labels[:, 1:] != IGNORED).to(kept.device) & ~kept[:, :-1]).any()):
        raise ValueError(
            "labels: expected -100 at image tokens, since removed ones predict nothing, got other "
            "labels; set those of image tokens to -100"
        )


def _refuse_cut(positions: Tensor, cache: Any) -> None:
    """Raise ValueError if a call continues the image that the call before it ended with."""
    if cache is None or cache.get_seq_length() == 0:
        return
    if bool((positions[:, 0] == 0).any()):
        raise ValueError(CUT)


def is_part(encoded: dict[str, Any] | None) -> bool:
    """Return whether image features are those of a chunk of a prompt.

    `generate` with prefill_chunk_size cuts what the model has encoded, and keeps features alone.
    """
    outputs = (output for output in (encoded or {}).values() if output is not None)
    return any(getattr(output, "last_hidden_state", None) is None for output in outputs)


def _fitted(mask: Tensor, new: int, cache: Any) -> Tensor:
    """Return a mask (B, K) without columns behind the new tokens, which a model may be given.

    Raises:
        ValueError: the mask of a prompt lacks columns, which removed tokens need.
    """
    tokens = new if cache is None else new + int(cache.get_seq_length())
    if mask.shape[1] < tokens and new > 1:
        raise ValueError(
            f"attention_mask: expected {tokens} columns, one for each cached and each new token, "
            f"got {mask.shape[1]}; pass 1 for tokens and 0 for padding, or no mask"
        )
    return mask[:, :tokens]


def _refuse_unknown(images: Tensor) -> None:
    """Raise ValueError if embeddings (B, N, D) of a prompt have no placeholder, `images` (B, N)."""
    if images.shape[1] > 1 and not images.any():
        raise ValueError(
            "inputs_embeds: expected the placeholders of images, which the model replaces, got a "
            "prompt without, in which image features cannot be told from text; pass input_ids, "
            "and pixel_values if it has images"
        )


def _refuse_static(cache: Any, mask: Any) -> None:
    """Raise TypeError for a language model with recurrent layers and a static cache.

    In its dict of masks, those of recurrent layers have no columns.
    """
    if is_static(cache) or isinstance(mask, dict):
        raise TypeError(
            "cache: expected a dynamic one, and a tensor (B, N) as attention_mask, for a language "
            f"model with recurrent layers, got {type(cache).__name__} and {type(mask).__name__}; "
            "call generate without cache_implementation"
        )


def _refuse_gaps(packing: Packing) -> None:
    """Raise ValueError if padding would come between a cache and the tokens that remain.

    It would change the state of layers that read a sequence token by token.
    """
    if not packing.real.all():
        raise ValueError(
            "input_ids: expected rows in which as many tokens remain, for a call that continues a "
            "cache of a language model with recurrent layers, got "
            f"{', '.join(map(str, packing.real.sum(1).tolist()))}; pass one row at a time"
        )


def _refuse_static_turn(cache: Any) -> None:
    """Raise ValueError for several tokens behind a static cache with removed tokens."""
    if has_reduced_slots(cache):
        raise ValueError(
            "input_ids: expected one token behind a static cache with removed tokens, got several, "
            "as a further turn or prefill_chunk_size passes them; begin with an empty cache, or "
            "call generate without cache_implementation"
        )


def _refuse_packed(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if several texts are packed into one row, whose borders would be lost."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    is_packed = kwargs.get("cu_seq_lens_q") is not None
    if positions is not None and positions.dim() == 2 and mask is None:
        is_packed = is_packed or bool((positions.diff(dim=-1) != 1).any())
    if is_packed:
        raise ValueError(
            "position_ids: expected one text a row, or an attention_mask beside them, got several "
            "texts packed into a row; turn off packing in the data collator"
        )
