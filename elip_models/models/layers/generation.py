"""Writing text with a causal tower: beam search or nucleus sampling, transformers' own.

    x_1 .. x_P given; then x_t from p(x | x_<t, states), until the end token or `max_length`

Keys and values of tokens that were read, and of the states attended to, are kept between steps.
"""

from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import BertConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.bert.modeling_bert import BertLayer
from transformers.utils import ModelOutput

from elip_models.models.config import Config
from elip_models.models.layers.bert import BertTower
from elip_models.validation import Positive, PositiveInt, PositiveShare

CACHE = "cache" if "cache" in signature(BertLayer.forward).parameters else "past_key_values"
"""What the installed transformers calls the keys and values of a `generate`."""


@dataclass(frozen=True)
class Decoding(Config):
    """How text is written; the defaults are BLIP's for captions.

    sample: draw each token from the nucleus of `top_p`, instead of searching.
    num_beams: of the search; 1 is greedy. Sampling has none.
    max_length, min_length: in tokens, the first one, the prompt and the end counted.
    top_p: the most probable tokens that together have this probability are drawn from.
    repetition_penalty: divides the score of a token that was written before; 1 is none.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.
    """

    sample: bool = False
    num_beams: PositiveInt = 3
    max_length: PositiveInt = 30
    min_length: PositiveInt = 10
    top_p: PositiveShare = 0.9
    repetition_penalty: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length: expected at most max_length = {self.max_length}, got "
                f"{self.min_length}"
            )


CAPTIONS = Decoding()


@torch.no_grad()
def write(
    tower: BertTower,
    head: nn.Module,
    input_ids: Tensor,
    states: tuple[Tensor, Tensor | None],
    *,
    end_token_id: int,
    decoding: Decoding,
) -> Tensor:
    """Continue texts; the modules' modes stay as they are, so that dropout is the caller's matter.

    Args:
        tower, head: all layers of the tower, and the head over its last one, write.
        input_ids: (B, P), P >= 1, all of them real.
        states: (B, N, D) to attend to, and their mask (B, N), 1 = real, or None.
        end_token_id: ends a text. The tower's pad token fills the rest.
        decoding: see `Decoding`.

    Returns:
        (B, L) int64, `input_ids` at the beginning, L <= max_length.

    Raises:
        ValueError: no room behind `input_ids`, or a text longer than the tower's positions.
    """
    P, positions = input_ids.shape[1], tower.config.max_position_embeddings
    if not P < decoding.max_length <= positions:
        raise ValueError(
            f"max_length: expected {P + 1}, one more than the tokens given, to {positions}, the "
            f"positions of the text tower, got {decoding.max_length}"
        )
    tokens, mask = states
    ids = _Writer(tower, head).generate(
        input_ids=input_ids,
        states=tokens,
        states_mask=mask,
        do_sample=decoding.sample,
        num_beams=1 if decoding.sample else decoding.num_beams,
        max_length=decoding.max_length,
        min_length=decoding.min_length,
        **({"top_p": decoding.top_p, "top_k": 0} if decoding.sample else {}),
        repetition_penalty=decoding.repetition_penalty,
        pad_token_id=tower.config.pad_token_id,
        eos_token_id=end_token_id,
        **{CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())},
    )
    ended = (ids[:, P:-1] == end_token_id).cumsum(1) > 0
    ids[:, P + 1 :].masked_fill_(ended, tower.config.pad_token_id)  # beam search puts the end there
    return ids


class _Writer(PreTrainedModel, GenerationMixin):
    """What transformers' `generate` asks of a model, over a tower and a head that it borrows."""

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
        """Logits (B, 1, V) behind input_ids (B, L), the tokens that the cache has not seen."""
        cache, (B, L) = named[CACHE], input_ids.shape
        seen = cache.get_seq_length()
        positions = torch.arange(seen, seen + L, device=input_ids.device)
        hidden = self.tower.run(
            self.tower.embed(input_ids, positions),
            input_ids.new_ones(B, seen + L),
            range(len(self.tower.layers)),
            states,
            states_mask,
            causal=True,
            cache=cache,
        )
        return ModelOutput(logits=self.head(hidden[:, -1:]))
