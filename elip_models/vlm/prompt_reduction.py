"""The removal of image tokens from a prompt, between the image features and the language model.

Hooks of stock modules remove them. A hook of the multimodal model finds the image tokens in its
input. Before the language model runs, a strategy selects image tokens. The others are removed from
the embeddings, positions and masks; the remaining tokens keep their positions. Afterwards the
hidden states get the whole length again, with zeros for removed tokens, as labels need.

The result is that of a model in which no token attends to the removed ones: the tests compare the
two. The last token of each image stays, because the token behind it is predicted from it.
"""

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elip_models.reduction.call_context import records_of
from elip_models.vlm.cache_length import removed_from, show_full_length, show_held_length
from elip_models.vlm.cache_state import CacheState, cache_in
from elip_models.vlm.call import PromptCall, begin_call, current_call, end_call
from elip_models.vlm.clips import TokenGroup, VideoLayout, groups_of_images
from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import Packing, gather_columns, hide
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy
from elip_models.vlm.tower_attention import tower_attention

LABELS: ContextVar[Tensor | None] = ContextVar("LABELS", default=None)


class PromptReduction:
    """The hooks that reduce one multimodal language model, and the strategy they use."""

    def __init__(self, multimodal: Multimodal, strategy: ImageTokenStrategy | None) -> None:
        self.strategy = strategy
        self.placeholder_ids = multimodal.placeholder_ids
        self.window = multimodal.window
        self.layout = _layout_for(strategy, multimodal)

    def install(self, multimodal: Multimodal) -> None:
        """Register the hooks."""
        model, language_model = multimodal.model, multimodal.language_model
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, with_kwargs=True, always_call=True)
        language_model.register_forward_pre_hook(self.remove, with_kwargs=True)
        language_model.register_forward_hook(self.restore, with_kwargs=True)
        if multimodal.head is not None:
            multimodal.head.register_forward_pre_hook(self.note_labels, with_kwargs=True)
            multimodal.head.register_forward_hook(
                self.forget_labels, with_kwargs=True, always_call=True
            )

    def note_labels(self, head: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the labels of the loss that will be computed."""
        LABELS.set(kwargs.get("labels"))

    def forget_labels(self, head: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forget the labels."""
        LABELS.set(None)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the image tokens of a forward pass of the multimodal model."""
        call = begin_call()
        _refuse_packed(kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        call.images = tokens_of(model, ids, embeds, self.placeholder_ids)
        if self.layout is not None and call.images is not None and call.images.shape[1] > 1:
            call.videos = tokens_of(model, ids, embeds, (self.layout.token_id,))
            call.clip_lengths = self.layout.clip_lengths(kwargs)
        if isinstance(mask, Tensor) and mask.dim() == 2 and call.images is not None:
            call.mask = mask

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forget the forward pass."""
        call = current_call()
        if call is not None and call.removed is not None and removed_from(call.cache) is None:
            show_full_length(call.cache, call.removed)  # the language model raised an error
        end_call()

    def remove(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove tokens from what the language model reads."""
        call = current_call()
        embeds = kwargs.get("inputs_embeds")
        if call is None or call.images is None or embeds is None:
            return None
        call.cache = cache_in(kwargs)
        call.removed = removed_from(call.cache)
        past = None if call.removed is None else call.removed.before
        selected = self._select(embeds, call, kwargs.get("position_ids"))
        length = embeds.shape[1]
        if selected is not None or past is not None:
            check_call(self.window, length + (past.length if past else 0), call.cache)
        if call.cache is not None:
            show_held_length(call.cache)
        if selected is None and past is None:
            return None
        if past is None:
            cached = 0 if call.cache is None else call.cache.get_seq_length()
            past = CacheState.whole(len(embeds), cached, embeds.device)
        if selected is None:
            call.state = past.grown(length)
        else:
            embeds, call.kept = selected
            _check_labels(call.kept)
            call.packing = Packing.of(call.kept)
            call.state = past.extended(call.packing.order, call.packing.real, length)
        new, call.state = _reduced_arguments(kwargs, embeds, call, past)
        return args, new

    def restore(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return hidden states to the length of the whole sequence."""
        call = current_call()
        if call is None or call.images is None:
            return None
        cache = cache_in(output) or call.cache
        for kept in call.whole_kept_behind()[-1:]:
            _check_labels(kept)
        for infos in records_of(self):
            infos.append(call.info(cache))
        if cache is not None and (removed := call.removed_afterwards()) is not None:
            show_full_length(cache, removed)
        if call.packing is None:
            return None
        scatter = call.packing.scatter
        output["last_hidden_state"] = scatter(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                None if hidden is None else scatter(hidden) for hidden in output["hidden_states"]
            )
        return output

    def _select(
        self, embeds: Tensor, call: PromptCall, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return embeddings and (B, N) bool, the tokens to keep; None to keep all."""
        images = call.images
        if self.strategy is None or images.shape[1] == 1:  # a step of decoding must not synchronise
            return None
        kept = torch.ones_like(images)
        is_shorter = False
        for group in self._groups(call, position_ids):
            rows, positions = group.rows, group.positions
            count = max(self.strategy.count(positions.shape[1]), len(group.always))
            if isinstance(self.strategy.keep, int) or count < positions.shape[1]:
                _refuse_cut(positions, call.cache)
            if count == positions.shape[1]:
                continue
            is_shorter = True
            context = self._context(embeds, call, group)
            chosen, values = self.strategy.reduce(embeds[rows, positions], count, context)
            kept[rows, positions] = False
            positions = positions.gather(1, chosen)
            kept[rows, positions] = True
            if values is not None:
                embeds = embeds.index_put((rows, positions), values.to(embeds.dtype))
        return (embeds, kept) if is_shorter else None

    def _groups(self, call: PromptCall, position_ids: Tensor | None) -> Iterator[TokenGroup]:
        """Yield the tokens from which the strategy selects."""
        if self.layout is None:
            yield from groups_of_images(call.images)
            return
        if not self.strategy.reads_frames:
            yield from groups_of_images(call.images & ~call.videos)
        yield from self.layout.clips(call.videos, call.clip_lengths, position_ids)

    def _context(self, embeds: Tensor, call: PromptCall, group: TokenGroup) -> ImageContext:
        """Return what the strategy reads beside the tokens of the images."""
        context = ImageContext(frame=group.frame, always=group.always)
        if self.strategy.reads_question:
            others = ~call.images
            if call.mask is not None:
                others = others & call.mask[:, -others.shape[1] :].bool()
            question = question_of(embeds, others, group.rows[:, 0])
            context = context._replace(question=question)
        if self.strategy.reads_tower:
            attention, keys = tower_attention(*group.positions.shape)
            context = context._replace(attention=attention, keys=keys)
        return context


def check_call(window: int | None, length: int, cache: Any) -> None:
    """Raise an error for a call whose result would not be that of the tokens that stay.

    `length` is that of the whole sequences, with the tokens in the cache.
    """
    if window is not None and length > window:
        raise ValueError(
            f"input_ids: expected at most {window} tokens, the window of the language "
            f"model's attention, since it counts the removed ones too, got {length}; call "
            "unreduce_ for longer prompts"
        )
    if getattr(cache, "is_compileable", False):
        raise TypeError(
            f"cache: expected a dynamic cache, got {type(cache).__name__}, whose length is "
            "fixed; call generate without cache_implementation"
        )


def _reduced_arguments(
    kwargs: dict[str, Any], embeds: Tensor, call: PromptCall, past: CacheState
) -> tuple[dict[str, Any], CacheState]:
    """Return the arguments of the language model for the tokens that remain, and its state."""
    packing, state = call.packing, call.state
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict) and any(whole is None for whole in mask.values()):
        mask = None  # plain causal attention, whose masks the language model makes itself
    if isinstance(mask, dict):
        mask = {kind: _mask(whole, packing, past, embeds) for kind, whole in mask.items()}
    else:
        mask = _mask(mask, packing, past, embeds)
        if mask.dim() == 2 and embeds.shape[1] > 1:
            state = replace(state, mask=mask[:, : state.columns.shape[1]])
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + past.length
    new = kwargs | {"attention_mask": mask, "position_ids": positions}
    if packing is not None:
        new["inputs_embeds"] = packing.rows(embeds)
        new["position_ids"] = packing.positions(positions)
    if kwargs.get("cache_position") is not None:
        width = new["inputs_embeds"].shape[1]
        new["cache_position"] = torch.arange(width, device=embeds.device) + past.held
    if packing is not None and kwargs.get("visual_pos_masks") is not None:
        new |= _reduced_deepstack(kwargs, packing)
    return new, state


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


def _layout_for(strategy: ImageTokenStrategy | None, multimodal: Multimodal) -> VideoLayout | None:
    """Return the layout of videos if the strategy needs it."""
    if strategy is None or not strategy.joins_frames:
        return None
    layout = VideoLayout.of(multimodal)
    if strategy.reads_frames or (layout is not None and layout.are_frames_apart):
        return layout
    return None  # a clip without text between frames is a run like an image


def question_of(embeds: Tensor, others: Tensor, rows: Tensor) -> Tensor:
    """Return (R, D), the mean embedding of the tokens `others` (B, N) bool beside each image.

    `rows` (R,) has the row of each image.
    """
    weights = others.to(embeds.dtype).unsqueeze(-1)
    mean = (embeds * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean[rows]


def tokens_of(
    model: nn.Module, ids: Tensor | None, embeds: Tensor | None, values: tuple[int, ...]
) -> Tensor | None:
    """Return (B, N) bool, which tokens are `values`, or None without ids and embeddings."""
    if ids is not None:
        return torch.isin(ids, ids.new_tensor(values))
    return None if embeds is None else _placeholders(model, embeds, values)  # of generate


def _placeholders(model: nn.Module, embeds: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Return (B, N) bool, which embeddings (B, N, D) are those of `ids`, if the model has these."""
    words = model.config.get_text_config().vocab_size
    known = torch.tensor([i for i in ids if i < words], device=embeds.device)
    rows = model.get_input_embeddings()(known)
    return (embeds.unsqueeze(-2) == rows).all(-1).any(-1)


def _check_labels(kept: Tensor) -> None:
    """Raise ValueError if a removed token would have to predict the label of the next one."""
    labels = LABELS.get()
    if labels is None or labels.shape != kept.shape:
        return
    if bool(((labels[:, 1:] != -100).to(kept.device) & ~kept[:, :-1]).any()):
        raise ValueError(
            "labels: expected -100 at image tokens, since removed ones predict nothing, got other "
            "labels; set those of image tokens to -100"
        )


def _refuse_cut(positions: Tensor, cache: Any) -> None:
    """Raise ValueError if a call continues the image that the call before it ended with."""
    if cache is None or cache.get_seq_length() == 0:
        return
    if bool((positions[:, 0] == 0).any()):
        raise ValueError(
            "input_ids: expected whole images, behind a token of text, got image tokens at the "
            "beginning of a call that continues a cache, as prefill_chunk_size cuts them; pass the "
            "prompt at once"
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
