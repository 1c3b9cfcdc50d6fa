"""BLIP captions images: a decoder writes what it sees, behind a prompt.

    text   [DEC] "a picture of" c_1 .. c_n [SEP], each layer attending to the image tokens
    loss   CE of each next token (label smoothing), none for those of the prompt

No text guides the image: its own caption would be told by which tokens stay. A config that reduces
does so by the image alone.
Source: BLIP_Decoder of BLIP's models/blip/model.py, configs/caption_coco.yaml.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from elip_models.models.blip.model import BLIP
from elip_models.models.blip.shared import Captioner
from elip_models.models.distilled_model import Encoders
from elip_models.models.downstream.blip import BLIPAloneConfig, BLIPTask, decoder_weights, under
from elip_models.models.layers.bert import BertTower, UntypedEmbeddings, masked_language_head
from elip_models.models.layers.generation import Decoding
from elip_models.models.layers.losses import IGNORED, language_loss, next_tokens
from elip_models.models.task_output import TaskOutput
from elip_models.reduction.strategy import mask_after
from elip_models.validation import Count, Size, Zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COCO = Decoding(max_length=20, min_length=5)
"""How the original captions COCO."""


@dataclass(frozen=True, kw_only=True)
class BLIPCaptioningConfig(BLIPAloneConfig):
    """Hyper-parameters of BLIP for captioning.

    prompt: what every caption begins with, in training and generation; the model is given its
        tokens, before those of the caption.
    prompt_tokens: how many they are, see `BLIPCaptioning.fit_tokenizer`.
    without_text: 'vision' lets a schedule reduce by the image alone, for there is no text.
    The other fields: see `BLIPAloneConfig`.
    """

    image_size: Size = 384
    context_length: Size = 40
    without_text: Literal["dense", "vision"] = "vision"
    guide_dropout: Zero = 0.0
    prompt: str = "a picture of "
    prompt_tokens: Count = 3


class BLIPCaptioning(Captioner, BLIPTask):
    """Image tower and decoder."""

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
    def from_pretraining(
        cls, weights: dict[str, Tensor], config: BLIPCaptioningConfig
    ) -> dict[str, Tensor]:
        """Weights of BLIP -> of this model, all of them: image tower, decoder and head."""
        return under(("encoders.visual.",), weights) | decoder_weights(weights)

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Also the tokens of the original's prompt; with another one, set `prompt_tokens` too."""
        sizes = super().fit_tokenizer(tokenizer, context_length)
        return sizes | {"prompt_tokens": len(_tokens(tokenizer, cls.config_class.prompt))}

    def prompt_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """The prompt's tokens, without the first and the last special one.

        Raises:
            ValueError: more or fewer than `prompt_tokens`.
        """
        config = self.config
        ids = _tokens(tokenizer, config.prompt)
        if len(ids) != config.prompt_tokens:
            raise ValueError(
                f"prompt_tokens: expected {len(ids)}, the tokens of prompt = {config.prompt!r}, "
                f"got {config.prompt_tokens}"
            )
        return ids

    def read_vocabulary_(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check that `prompt_tokens` are those of the prompt; raises as `prompt_ids`."""
        self.prompt_ids(tokenizer)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> TaskOutput:
        """Compute the loss of a batch of captions.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real; the prompt behind the first token.
        """
        tokens, infos = self.encode_image(images)
        logits = self.predict(input_ids, attention_mask, tokens, mask_after(infos))
        labels = next_tokens(input_ids, attention_mask)
        labels[:, : self.config.prompt_tokens] = IGNORED
        loss = language_loss(
            logits, labels, smoothing=self.config.label_smoothing, gather=self.config.gather
        )
        return TaskOutput(loss, logits)


def _tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """The ids of a prompt, whose last space is the next word's, without special tokens."""
    return tokenizer(prompt.rstrip()).input_ids[1:-1]
