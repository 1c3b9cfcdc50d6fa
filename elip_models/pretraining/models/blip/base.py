"""Shared part of BLIP and the models fine-tuned from it: config, encoders, text generation.

BLIP's text tower is a BERT with cross attention in every layer. It encodes a text alone, or fuses
it with an image: then the token [ENC] replaces the first one. A causal decoder generates text from
the token [DEC] on.

Source: BLIP (Li et al., 2022), models/blip.py and models/med.py of the official code.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.models.config import TextReductionConfig, TokenId
from elip_models.pretraining.models.cross_modal import CrossModalModel
from elip_models.pretraining.models.distilled_model import Encoders, MomentumConfig
from elip_models.pretraining.models.layers.bert import BertTower, UntypedEmbeddings
from elip_models.pretraining.models.layers.generation import CAPTIONS, Decoding, generate
from elip_models.pretraining.models.layers.text_reduction import ReducedText, TextReduction
from elip_models.validation import NonNegative, Share, Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class BLIPConfig(MomentumConfig, TextReductionConfig):
    """Hyper-parameters of a BLIP model; the defaults are the paper's.

    For the other fields, see `MomentumConfig`, whose alpha weights the momentum targets of ITC, and
    `TextReductionConfig`. Text reduction applies to all three passes of `BLIP.forward`, not to the
    momentum encoder.

    Attributes:
        decoder_token_id: id of [DEC], which replaces the first token of a generated text.
        encoder_token_id: id of [ENC], which replaces the first token of a fused text.
        tie_decoder: share all weights but self-attention between decoder and encoder, as in
            pre-training. False gives the decoder its own weights, as fine-tuned models have.
    """

    captions: Literal["plain", "albef", "blip", "blip_question"] = "blip"
    vocab_size: Size = 30524
    decoder_token_id: TokenId = 30522
    encoder_token_id: TokenId = 30523
    queue_size: Size = 57600
    alpha_warmup_epochs: NonNegative = 2.0
    label_smoothing: Share = 0.1
    negative_epsilon: Share = 1e-4
    tie_decoder: bool = True


class BLIPEncoders(Encoders):
    """Parts that have a momentum copy: image tower and text tower."""

    def __init__(self, config: BLIPConfig, *, projects: bool = True) -> None:
        super().__init__(config, projects=projects)
        self.layers = range(config.text_depth)
        self.text = BertTower(config.bert, self.layers, embeddings=UntypedEmbeddings)

    def encode_text(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image_tokens: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode texts (B, L) -> (B, L, D), with cross attention to image_tokens if given."""
        hidden = self.text.embed(input_ids)
        return self.text.run(hidden, mask, self.layers, image_tokens, image_mask)


class BLIPBase(CrossModalModel):
    """Tokenizer and text towers of BLIP.

    Attributes:
        adds_similarity: re-ranking adds the similarity of features to the score of ITM.
    """

    adds_similarity: ClassVar[bool] = True
    config: BLIPConfig
    encoders: Encoders
    masks_text = False

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Add [DEC] and [ENC] to the tokenizer, and return the config fields that follow."""
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        decoder, encoder = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
        sizes = super().fit_tokenizer(tokenizer, context_length)
        return sizes | {"decoder_token_id": decoder, "encoder_token_id": encoder}


class BLIPWithEncoder(BLIPBase):
    """BLIP that fuses a text with an image, from [ENC] on."""

    encoders: BLIPEncoders
    fuses_ids = True

    def fuse(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Return the ids `text` (B, L), with [ENC] first, fused with the image -> (B, L, D)."""
        ids = replace_first_token(text, self.config.encoder_token_id)
        return self.encoders.encode_text(ids, mask, image, image_mask)


class BLIPWithDecoder(BLIPBase):
    """BLIP with a causal text tower `decoder` and a language head, which generate from [DEC] on."""

    decoder: BertTower
    language_head: BertOnlyMLMHead

    def predict(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image_tokens: Tensor,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, L, V) of the next token after [DEC] and each prefix of the text.

        Cross attention reads image_tokens (B, N, D), of an image or of a fused question.
        """
        image = image_tokens, image_mask
        return self.language_head(self.decode(input_ids, mask, image, None).tokens)

    def decode(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image: tuple[Tensor, Tensor | None],
        reduction: TextReduction | None,
    ) -> ReducedText:
        """Run the decoder on [DEC] and the following ids; `image` is tokens and mask."""
        hidden = self.decoder.embed(replace_first_token(input_ids, self.config.decoder_token_id))
        layers = range(len(self.decoder.layers))
        return self.decoder.run_reduced(hidden, mask, layers, reduction, *image, causal=True)

    def generate_from_tokens(
        self,
        image_tokens: Tensor,
        image_mask: Tensor | None = None,
        *,
        prompt: Tensor | None = None,
        decoding: Decoding = CAPTIONS,
    ) -> Tensor:
        """Generate text from image tokens, always without dropout; see `BLIPCaptioner.generate`."""
        config, B = self.config, len(image_tokens)
        ids = torch.full((B, 1), config.decoder_token_id, device=image_tokens.device)
        if prompt is not None:
            fits = prompt.dim() == 2 and len(prompt) == B and prompt.dtype == ids.dtype
            if not fits or (prompt == config.pad_token_id).any():
                raise ValueError(
                    f"prompt: expected int64 ids of shape ({B}, P) without padding, got "
                    f"{prompt.dtype} of shape {tuple(prompt.shape)} with "
                    f"{int((prompt == config.pad_token_id).sum())} padding ids; pass prompts of "
                    "different lengths in separate batches"
                )
            ids = torch.cat([ids, prompt], dim=1)
        with eval_mode(self):
            return generate(
                self.decoder,
                self.language_head,
                ids,
                (image_tokens, image_mask),
                end_token_id=config.sep_token_id,
                decoding=decoding,
            )


class BLIPCaptioner(BLIPWithDecoder):
    """BLIP that generates text from an image."""

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        prompt: Tensor | None = None,
        text_cls: Tensor | None = None,
        decoding: Decoding = CAPTIONS,
    ) -> Tensor:
        """Generate captions, always without dropout.

        Args:
            images: (B, 3, H, W), each encoded once.
            prompt: (B, P) ids that the captions start with, without padding, first or last special
                token; None for no prompt.
            text_cls: (B, D) that guides the image tower, see `encode_image`; None: the config's
                `without_text` determines the kept patches.
            decoding: beam search or nucleus sampling, and the length.

        Returns:
            (B, L) int64: [DEC], the prompt, the caption and its end token, then padding.

        Raises:
            ValueError: `prompt` has another shape or dtype or contains padding, or the text is
                longer than the positions of the text tower.
        """
        with eval_mode(self):
            image = self.encode_masked(images, text_cls)
        return self.generate_from_tokens(*image, prompt=prompt, decoding=decoding)


def replace_first_token(input_ids: Tensor, token: int) -> Tensor:
    """Return a copy of the ids (B, L) with another first token."""
    ids = input_ids.clone()
    ids[:, 0] = token
    return ids
