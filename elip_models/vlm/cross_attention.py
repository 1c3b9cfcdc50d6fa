"""Fewer image tokens for a language model that reads images by cross-attention (Mllama).

The text is a sequence of its own. Some layers attend from the text to the tokens of all tiles; a
hook of the language model removes tokens of each tile. All tokens of a tile have the same mask, so
the mask of the remaining ones follows from their number alone: decoding needs no further state.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elip_models.call_context import records_of
from elip_models.vlm.budget import budget_of
from elip_models.vlm.cache_state import cache_in
from elip_models.vlm.call import begin_call, current_call
from elip_models.vlm.families import Multimodal
from elip_models.vlm.prompt_reduction import PromptReduction, tokens_of
from elip_models.vlm.question import Question
from elip_models.vlm.static_cache import is_static
from elip_models.vlm.strategies.base import ImageContext, ImageTokenStrategy


class CrossAttentionReduction(PromptReduction):
    """The hooks that reduce one language model with cross-attention, and the strategy they use."""

    def __init__(self, multimodal: Multimodal, strategy: ImageTokenStrategy) -> None:
        super().__init__(multimodal, strategy)
        self.tile = multimodal.tower.num_patches
        self.layer = multimodal.cross_attention_layers[0]

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin_call(self)

    def remove(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove tokens from what the cross-attention layers read."""
        states, mask = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask")
        cache, new = cache_in(kwargs), {}
        if is_static(cache):
            raise TypeError(
                f"cache: expected a dynamic cache, got {type(cache).__name__}, which has slots for "
                "all tokens of the tiles; call generate without cache_implementation"
            )
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
        count, call = self._count(states, kwargs), current_call()
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

    def _count(self, states: Tensor, kwargs: dict[str, Any]) -> int:
        """Return how many tokens of each tile stay, the same for all of them."""
        budget, length = budget_of(self), states.shape[1]
        keep = None if budget is None else budget.keep
        if isinstance(keep, tuple):
            raise ValueError(
                "keep: expected the same for every tile of a language model with "
                f"cross-attention, got {len(keep)} of them; pass a single one, or `total`"
            )
        if budget is None or budget.total is None:
            return self.strategy.count(length, keep)
        tiles = len(states) // len(_text(kwargs))
        if budget.total < tiles:
            raise ValueError(
                f"total: expected at least {tiles}, a token for each tile of the prompt, got "
                f"{budget.total}; pass a larger total"
            )
        return self.strategy.count(length, budget.total // tiles)

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
        """Return the mean embedding (tiles, D) of the question before the first label of a row."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        images = tokens_of(model, ids, embeds, self.placeholder_ids)
        question = Question.of(self, images, kwargs.get("attention_mask"))
        if embeds is None:
            embeds = model.get_input_embeddings()(ids)
        rows = torch.arange(len(embeds), device=embeds.device)
        rows = rows.repeat_interleave(tiles // len(embeds))
        return question.means(embeds, rows, torch.zeros_like(rows))


def _text(kwargs: dict[str, Any]) -> Tensor:
    """Return the ids or embeddings of the text."""
    ids = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if ids is None else ids
