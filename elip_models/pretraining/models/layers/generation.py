"""Text generation by a causal tower, with `generate` of transformers.

    x_1 .. x_P of the prompt; then x_t from p(x | x_<t, states), until the end token or `max_length`

Keys and values of earlier tokens, and of the states, are cached between steps.
"""

from copy import copy
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.bert.modeling_bert import BertLayer
from transformers.utils import ModelOutput

from elip_models.pretraining.models.layers.bert import BertTower

CACHE = "cache" if "cache" in signature(BertLayer.forward).parameters else "past_key_values"
"""Argument name of the cache in the installed version of transformers."""


@torch.no_grad()
def generate(
    tower: BertTower,
    head: nn.Module,
    input_ids: Tensor,
    states: tuple[Tensor, Tensor | None],
    *,
    end_token_id: int,
    decoding: GenerationConfig,
) -> Tensor:
    """Continue texts (B, P) without padding, in the current mode of the modules -> (B, L) int64.

    `head` returns logits from the last hidden state of the tower. `states` are (B, N, D) for cross
    attention, and their mask (B, N) or None. Pad tokens follow `end_token_id`. ValueError is raised
    if max_length leaves no room after `input_ids`, or exceeds the tower's positions.
    """
    P, positions = input_ids.shape[1], tower.config.max_position_embeddings
    if not P < decoding.max_length <= positions:
        raise ValueError(
            f"max_length: expected {P + 1}, one more than the tokens of the prompt, to "
            f"{positions}, the positions of the text tower, got {decoding.max_length}"
        )
    decoding = copy(decoding)
    decoding.update(pad_token_id=tower.config.pad_token_id, eos_token_id=end_token_id)
    ids = _GenerationModel(tower, head).generate(
        input_ids=input_ids,
        states=states[0],
        states_mask=states[1],
        generation_config=decoding,
        **{CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())},
    )
    ended = (ids[:, P:-1] == end_token_id).cumsum(1) > 0
    # Beam search can pad with the end token.
    return ids.masked_fill_(F.pad(ended, (P + 1, 0)), tower.config.pad_token_id)


class _GenerationModel(PreTrainedModel, GenerationMixin):
    """Adapter of a tower and a head to `generate` of transformers."""

    config_class = BertConfig
    main_input_name = "input_ids"

    def __init__(self, tower: BertTower, head: nn.Module) -> None:
        super().__init__(BertConfig(**tower.config.to_dict()))
        self.tower, self.head = tower, head

    def forward(
        self,
        input_ids: Tensor,
        states: Tensor,
        states_mask: Tensor | None = None,
        **named: object,
    ) -> ModelOutput:
        """Return logits (B, 1, V) after input_ids (B, L), the tokens that are not in the cache."""
        cache, (B, L) = named[CACHE], input_ids.shape
        cached = cache.get_seq_length()
        positions = torch.arange(cached, cached + L, device=input_ids.device)
        embedded, mask = self.tower.embed(input_ids, positions), input_ids.new_ones(B, cached + L)
        image = {"image_tokens": states, "image_mask": states_mask}
        hidden = self.tower.run(embedded, mask, **image, causal=True, cache=cache)
        return ModelOutput(logits=self.head(hidden[:, -1:]))
