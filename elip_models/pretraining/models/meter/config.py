"""Hyper-parameters of METER."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import BertConfig

from elip_models.pretraining.models.config import TextReductionConfig, TokenId
from elip_models.pretraining.models.cross_modal import CrossModalConfig
from elip_models.validation import Depth, NonNegative, PositiveInt, Share, Size, divisor_of

ROBERTA = {  # fields of METERConfig with other values for roberta-base
    "text_encoder": "roberta",
    "vocab_size": 50265,
    "max_positions": 514,
    "cls_token_id": 0,
    "pad_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 50264,
}


@dataclass(frozen=True, kw_only=True)
class METERConfig(CrossModalConfig, TextReductionConfig):
    """Hyper-parameters of a METER model; the defaults are the official code's.

    For the other fields, see `CrossModalConfig` and `TextReductionConfig`. Text reduction drops
    tokens half way through the text encoder, before fusion.

    Attributes:
        vision_depth: number of blocks that run, all of CLIP's but the last.
        text_encoder: 'bert' or 'roberta'; `ROBERTA` has the other fields for the second.
        cross_width: width of the co-attention layers; `cross_depth` is their number on each side.
        dropout: of the text encoder and of the co-attention layers.
        mask_whole_words: mask words instead of tokens, see `METER.read_vocabulary_`.
    """

    vision_depth: Depth = 11
    vision_norm_eps: NonNegative = 1e-5
    context_length: Size = 50
    text_encoder: Literal["bert", "roberta"] = "bert"
    cross_width: Size = 768
    cross_depth: Depth = 6
    cross_heads: Annotated[PositiveInt, divisor_of("cross_width")] = 12
    cross_hidden: Size = 3072
    dropout: Share = 0.1
    mask_token_id: TokenId = 103
    mask_probability: Share = 0.15
    mask_whole_words: bool = False

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a text; RoBERTa's positions start after the padding's."""
        unused = self.pad_token_id + 1 if self.text_encoder == "roberta" else 0
        return self.max_positions - unused

    def bert(self, part: Literal["text", "cross"]) -> BertConfig:
        """Return the config of the text encoder, or of the co-attention layers of one side."""
        is_roberta = part == "text" and self.text_encoder == "roberta"
        return self.bert_config(
            part,
            dropout=self.dropout,
            type_vocab_size=1 if is_roberta else 2,
            layer_norm_eps=1e-5 if is_roberta else 1e-12,
        )
