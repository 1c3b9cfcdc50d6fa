"""Fewer image tokens for a language model that reads images by cross-attention (Mllama).

The text is a sequence of its own. Some layers attend from the text to the tokens of all tiles; a
hook of the language model removes tokens of each tile. All tokens of a tile have the same mask, so
the mask of the remaining ones follows from their number alone: decoding needs no further state.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elip_models.reduction.call_context import records_of
from elip_models.vlm.cache_state import cache_in
from elip_models.vlm.call import begin_call, current_call
from elip_models.vlm.families import Multimodal
from elip_models.vlm.prompt_reduction import (
    PromptReduction,
    check_call,
    question_of,
    tokens_of,
)
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy


class CrossAttentionReduction(PromptReduction):
    """The hooks that reduce one language model with cross-attention, and the strategy they use."""

    def __init__(self, multimodal: Multimodal, strategy: ImageTokenStrategy) -> None:
        super().__init__(multimodal, strategy)
        self.tile = multimodal.tower.num_patches
        self.layer = multimodal.cross_attention_layers[0]

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward pass of the multimodal model."""
        begin_call()

    def remove(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove tokens from what the cross-attention layers read."""
        states, mask = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask")
        cache, new = cache_in(kwargs), {}
        check_call(None, 0, cache)
        if states is not None:
            new["cross_attention_states"] = states = self._reduced(model, states, kwargs)
        if mask is not None:
            keys = 0 if states is None else states.shape[:2].numel() // len(mask)
            if cache is not None and self.layer < len(cache.layers):
                keys += cache.get_seq_length(self.layer)
            new["cross_attention_mask"] = self._reduced_mask(mask, keys)
        return args, kwargs | new

    def restore(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Record what the forward pass kept."""
        call = current_call()
        if call is not None and call.images is not None:
            for infos in records_of(self):
                infos.append(call.info(cache_in(output)))

    def _reduced(self, model: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return (tiles, k, D), the tokens of the tiles (tiles, n, D) that remain."""
        count, call = self.strategy.count(states.shape[1]), current_call()
        kept = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if count < states.shape[1]:
            context = ImageContext(always=())  # no token is predicted from one of an image
            if self.strategy.reads_question:
                context = context._replace(question=self._question(model, len(states), kwargs))
            chosen, values = self.strategy.reduce(states, count, context)
            kept = torch.zeros_like(kept).scatter(1, chosen, True)
            if values is None:
                values = states[kept].view(len(states), count, -1)
            states = values.to(states.dtype)
        if call is not None:
            batch = len(_text(kwargs))
            call.kept = kept.view(batch, -1)
            call.images = torch.ones_like(call.kept)
        return states

    def _reduced_mask(self, mask: Tensor, keys: int) -> Tensor:
        """Return the mask (B, 1, S, keys) of one for every token of all tiles."""
        tiles = mask.shape[-1] // self.tile
        if keys % tiles:
            raise ValueError(
                f"cache: expected one that the same strategy has filled, with as many tokens of "
                f"each of {tiles} tiles, got {keys} in all; begin with an empty cache"
            )
        return mask.unflatten(-1, (tiles, self.tile))[..., : keys // tiles].flatten(-2)

    def _question(self, model: nn.Module, tiles: int, kwargs: dict[str, Any]) -> Tensor:
        """Return the mean embedding (tiles, D) of the text beside each tile."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        others = ~tokens_of(model, ids, embeds, self.placeholder_ids)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            others = others & mask[:, -others.shape[1] :].bool()
        if embeds is None:
            embeds = model.get_input_embeddings()(ids)
        rows = torch.arange(len(embeds), device=embeds.device)
        return question_of(embeds, others, rows.repeat_interleave(tiles // len(embeds)))


def _text(kwargs: dict[str, Any]) -> Tensor:
    """Return the ids or embeddings of the text."""
    ids = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if ids is None else ids
