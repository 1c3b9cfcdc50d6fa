"""BLIP fine-tuned for image captioning: a decoder generates the caption after a prompt.

    text   [DEC] "a picture of" c_1 .. c_n [SEP], with cross attention to the image tokens
    loss   cross entropy of each next token with label smoothing, without the prompt's tokens

No text guides the image tower, since the kept tokens would reveal the caption to the decoder. A
schedule in the config reduces by the image alone.

Source: BLIP_Decoder in models/blip.py of BLIP, and configs/caption_coco.yaml.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from elip_models.pretraining.models.blip.base import BLIPCaptioner
from elip_models.pretraining.models.blip.downstream import BLIPTask, BLIPTaskConfig, decoder_weights
from elip_models.pretraining.models.blip.model import BLIP
from elip_models.pretraining.models.distilled_model import Encoders
from elip_models.pretraining.models.downstream import TaskOutput, Weights, select_parts
from elip_models.pretraining.models.layers.bert import (
    BertTower,
    UntypedEmbeddings,
    masked_language_head,
)
from elip_models.pretraining.models.layers.generation import Decoding
from elip_models.pretraining.models.layers.losses import IGNORED, language_loss, next_tokens
from elip_models.validation import Count, Size, Zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COCO = Decoding(max_length=20, min_length=5)
"""Parameters of the original for captions of COCO."""


@dataclass(frozen=True, kw_only=True)
class BLIPCaptioningConfig(BLIPTaskConfig):
    """Hyper-parameters of BLIP for captioning; for the other fields, see `BLIPTaskConfig`.

    Attributes:
        prompt: start of every caption, in training and in generation.
        prompt_tokens: number of its tokens, see `BLIPCaptioning.fit_tokenizer`.
        without_text: 'vision' lets a schedule reduce by the image alone.
    """

    image_size: Size = 384
    context_length: Size = 40
    without_text: Literal["dense", "vision"] = "vision"
    guide_dropout: Zero = 0.0
    prompt: str = "a picture of "
    prompt_tokens: Count = 3


class BLIPCaptioning(BLIPCaptioner, BLIPTask):
    """BLIP with an image tower and a decoder."""

    family = "blip_captioning"
    task = "captioning"
    config_class = BLIPCaptioningConfig
    config: BLIPCaptioningConfig
    pretraining = BLIP

    def __init__(self, config: BLIPCaptioningConfig) -> None:
        super().__init__(config, Encoders(config, projects=False))
        layers = range(config.text_depth)
        self.decoder = BertTower(config.bert, layers, embeddings=UntypedEmbeddings)
        self.language_head = masked_language_head(self.decoder)

    @classmethod
    def from_pretraining(cls, weights: Weights, config: BLIPCaptioningConfig) -> Weights:
        """Map image tower, decoder and language head of a pre-trained BLIP to this model."""
        return select_parts(weights, "encoders.visual.") | decoder_weights(weights)

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Return the config fields; set `prompt_tokens` as well for a prompt of your own."""
        sizes = super().fit_tokenizer(tokenizer, context_length)
        return sizes | {"prompt_tokens": len(_tokens(tokenizer, cls.config_class.prompt))}

    def prompt_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the ids of the prompt alone; ValueError if their number is not `prompt_tokens`."""
        config = self.config
        ids = _tokens(tokenizer, config.prompt)
        if len(ids) != config.prompt_tokens:
            raise ValueError(
                f"prompt_tokens: expected {len(ids)}, the tokens of prompt = {config.prompt!r}, "
                f"got {config.prompt_tokens}"
            )
        return ids

    def read_vocabulary_(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check that the prompt has `prompt_tokens` tokens, see `prompt_ids`."""
        self.prompt_ids(tokenizer)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> TaskOutput:
        """Return the loss of captions (B, L), with the prompt after the first token."""
        logits = self.predict(input_ids, attention_mask, *self.encode_masked(images))
        labels = next_tokens(input_ids, attention_mask)
        labels[:, : self.config.prompt_tokens] = IGNORED
        loss = language_loss(
            logits, labels, smoothing=self.config.label_smoothing, gather=self.config.gather
        )
        return TaskOutput(loss, logits)


def _tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    return tokenizer(prompt.rstrip()).input_ids[1:-1]
