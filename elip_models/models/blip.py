"""BLIP with a text-guided, token-reduced image tower.

    text     BERT on the text alone; its CLS output guides the image tower
    image    ViT reduced by ELIP; features of both towers
    encoder  the same BERT from [ENC] on, each layer attending to the image tokens too
    decoder  causal self-attention of its own, all else the encoder's, from [DEC] on
    loss     ITC (soft targets, queue) + ITM (hard negatives) + LM (label smoothing)

Source: BLIP (Li et al., 2022); ELIP, section 3 and its official BLIP code.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from elip_models.models.base import evaluating
from elip_models.models.config import TextReductionConfig, TokenId
from elip_models.models.layers.bert import (
    BertTower,
    UntypedEmbeddings,
    masked_language_head,
    tied_decoder,
    untied_decoder,
)
from elip_models.models.layers.generation import CAPTIONS, Decoding, write
from elip_models.models.layers.losses import language_loss, next_rows, next_tokens
from elip_models.models.layers.text_reduction import ReducedText, TextReduction
from elip_models.models.momentum_model import Encoders, MomentumConfig, MomentumModel
from elip_models.reduction.strategy import mask_after
from elip_models.validation import NonNegative, PositiveInt, Share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class BLIPConfig(MomentumConfig, TextReductionConfig):
    """Hyper-parameters of a BLIP model; the defaults are the paper's.

    decoder_token_id, encoder_token_id: [DEC] and [ENC], instead of a text's first token.
    The other fields: see `MomentumConfig`; alpha weighs the momentum targets of ITC; and
    `TextReductionConfig`, by which the texts of `BLIP.forward` lose tokens in all three of its
    passes, those of the momentum encoder none.
    tie_decoder: the decoder shares all but self-attention with the encoder, as in pre-training;
        False gives it weights of its own, as in models fine-tuned for captions or answers.
    """

    captions: Literal["plain", "albef", "blip"] = "blip"
    vocab_size: PositiveInt = 30524
    decoder_token_id: TokenId = 30522
    encoder_token_id: TokenId = 30523
    queue_size: PositiveInt = 57600
    alpha_warmup_epochs: NonNegative = 2.0
    label_smoothing: Share = 0.1
    negative_epsilon: Share = 1e-4
    tie_decoder: bool = True


@dataclass
class BLIPOutput:
    """loss: the sum of the three others, scalars. image_features, text_features: (B, E)."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_lm: Tensor
    image_features: Tensor
    text_features: Tensor


class Drawn(NamedTuple):
    """What `forward` draws at random, for a caller that has drawn it.

    negative_images: (B,) for each text. negative_texts: (B,) for each image; both number the pairs
        of all ranks where gather='global'.
    """

    negative_images: Tensor
    negative_texts: Tensor


class BLIPEncoders(Encoders):
    """The parts that have a momentum copy."""

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config)
        self.layers = range(config.text_depth)
        self.text = BertTower(config.bert, self.layers, embeddings=UntypedEmbeddings)

    def read(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image_tokens: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """input_ids, mask (B, L), with image_tokens (B, N, D), all or as image_mask (B, N) says, or
        alone -> (B, L, D)."""
        hidden = self.text.embed(input_ids)
        return self.text.run(hidden, mask, self.layers, image_tokens, image_mask)


class BLIP(MomentumModel):
    """Image and text towers, decoder, their momentum copies and the feature queue."""

    family = "blip"
    config_class = BLIPConfig
    config: BLIPConfig
    encoders: BLIPEncoders
    masks_text = False
    fuses_ids = True

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config, BLIPEncoders(config))
        self.text_reduction = config.text_token_reduction
        text = self.encoders.text
        self.decoder = tied_decoder(text) if config.tie_decoder else untied_decoder(text)
        self.language_head = masked_language_head(self.decoder)

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Adds [DEC] and [ENC] to the tokenizer; otherwise as the other cross-modal models."""
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        decoder, encoder = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
        sizes = super().fit_tokenizer(tokenizer, context_length)
        return sizes | {"decoder_token_id": decoder, "encoder_token_id": encoder}

    def fuse(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """text, mask (B, L), image (B, N, D) and image_mask (B, N), None where all are real ->
        (B, L, D) of [ENC] and the ids behind it."""
        ids = _begin(text, self.config.encoder_token_id)
        return self.encoders.read(ids, mask, image, image_mask)

    def read_pairs(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """images, input_ids, mask -> (B, K, D), the texts alone, half way without the tokens that
        `text_reduction` drops."""
        image_cls = self.dense_cls(images) if self.config.image_guides_text else None
        text, layers = self.encoders.text, self.encoders.layers
        hidden = text.embed(input_ids)
        return text.run_reduced(
            hidden, mask, layers, self.text_reduction, image_cls=image_cls
        ).tokens

    def fuse_pairs(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None
    ) -> Tensor:
        """As `fuse` -> (B, K, D), half way without the tokens that `text_reduction` drops."""
        tower, layers = self.encoders.text, self.encoders.layers
        hidden = tower.embed(_begin(text, self.config.encoder_token_id))
        return tower.run_reduced(
            hidden, mask, layers, self.text_reduction, image, image_mask
        ).tokens

    def predict(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image_tokens: Tensor,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict each next token after [DEC] and the text up to it.

        Args:
            input_ids, mask: (B, L), 1 = real.
            image_tokens: (B, N, D) to attend to; of an image, or of a question fused with it.
            image_mask: (B, N), 1 = real; None where all of them are.

        Returns:
            (B, L, V).
        """
        image = image_tokens, image_mask
        return self.language_head(self._decode(input_ids, mask, image, None).tokens)

    def _decode(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image: tuple[Tensor, Tensor | None],
        reduction: TextReduction | None,
    ) -> ReducedText:
        """Run the decoder on [DEC] and the ids behind it; `image` is tokens and mask."""
        hidden = self.decoder.embed(_begin(input_ids, self.config.decoder_token_id))
        layers = self.encoders.layers
        return self.decoder.run_reduced(hidden, mask, layers, reduction, *image, causal=True)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        prompt: Tensor | None = None,
        text_cls: Tensor | None = None,
        decoding: Decoding = CAPTIONS,
    ) -> Tensor:
        """Write captions, without dropout, whatever the mode of the model.

        Args:
            images: (B, 3, H, W), each encoded once.
            prompt: (B, P) ids that the captions begin with, all of them real, without the first
                and the last special token; None where there is none.
            text_cls: (B, D) that guides the image tower, see `encode_image`; a captioner has none,
                so that all patches are kept, or as many as `without_text` says.
            decoding: beam search or nucleus sampling, and how long.

        Returns:
            (B, L) int64: [DEC], the prompt, the caption and its end, then padding.

        Raises:
            ValueError: another shape or dtype of prompt, or one with padding; a length for which
                the text tower has no positions.
        """
        with evaluating(self):
            tokens, infos = self.encode_image(images, text_cls)
        return self.generate_from_tokens(
            tokens, mask_after(infos), prompt=prompt, decoding=decoding
        )

    def generate_from_tokens(
        self,
        image_tokens: Tensor,
        image_mask: Tensor | None = None,
        *,
        prompt: Tensor | None = None,
        decoding: Decoding = CAPTIONS,
    ) -> Tensor:
        """Write as `generate` does, from image_tokens (B, N, D) and image_mask (B, N), see
        `predict`."""
        config, B = self.config, len(image_tokens)
        ids = torch.full((B, 1), config.decoder_token_id, device=image_tokens.device)
        if prompt is not None:
            fits = prompt.dim() == 2 and len(prompt) == B and prompt.dtype == ids.dtype
            if not fits or (prompt == config.pad_token_id).any():
                raise ValueError(
                    f"prompt: expected int64 ids of the shape ({B}, P), none of them padding, got "
                    f"{prompt.dtype} of {tuple(prompt.shape)} with "
                    f"{int((prompt == config.pad_token_id).sum())} of padding; write prompts of "
                    "different lengths in batches of their own"
                )
            ids = torch.cat([ids, prompt], dim=1)
        with evaluating(self):
            return write(
                self.decoder,
                self.language_head,
                ids,
                (image_tokens, image_mask),
                end_token_id=config.sep_token_id,
                decoding=decoding,
            )

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> BLIPOutput:
        """Compute pre-training losses of a batch of pairs; in training momentum and queue move on.

        Here alone texts lose tokens, as `config.text_reduction` says: ITC, ITM and LM read those
        that stay. 'learned' adds a dense forward of the image tower, without gradient, for ITC's
        text comes before the image that it guides.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            guide_ids, guide_mask: (B, L), other captions of the images, where the config says
                guide='other'.
            drawn: negatives instead of drawing them, so that a run can be repeated by another
                implementation.
        """
        seen = self.contrast(images, input_ids, attention_mask, guide_ids, guide_mask)
        if drawn is None:
            drawn = Drawn(*self.draw_negatives(seen.similar))
        text, image = (input_ids, attention_mask), (seen.image, seen.image_mask)
        loss_itm = self.matching_loss(*text, seen.image, drawn, image_mask=seen.image_mask)
        written = self._decode(*text, image, self.text_reduction)
        loss_lm = language_loss(
            self.language_head(written.tokens),
            written.labels(next_tokens(*text)),
            self.config.label_smoothing,
            self.config.gather,
        )
        loss = seen.loss + loss_itm + loss_lm
        return BLIPOutput(loss, seen.loss, loss_itm, loss_lm, *seen.features)

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> Drawn:
        others = next_rows(len(images), images.device)
        return Drawn(others, others)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        for tower in (self.encoders.visual, self.encoders.text, self.decoder):
            tower.set_grad_checkpointing(enable)


def _begin(input_ids: Tensor, token: int) -> Tensor:
    """Replace the first token of the ids (B, L)."""
    ids = input_ids.clone()
    ids[:, 0] = token
    return ids
