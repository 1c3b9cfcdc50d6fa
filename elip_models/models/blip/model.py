"""BLIP with a text-guided, token-reduced image tower.

    text     BERT on the text alone; its CLS output guides the image tower
    image    ViT reduced by ELIP; features of both towers
    encoder  the same BERT from [ENC] on, each layer attending to the image tokens too
    decoder  causal self-attention of its own, all else the encoder's, from [DEC] on
    loss     ITC (soft targets, queue) + ITM (hard negatives) + LM (label smoothing)

Source: BLIP (Li et al., 2022); ELIP, section 3 and its official BLIP code.
"""

from dataclasses import dataclass

from torch import Tensor

from elip_models.models.blip.shared import BLIPConfig, BLIPEncoders, Captioner, Reader, begin_with
from elip_models.models.layers.bert import (
    BertTower,
    masked_language_head,
    tied_decoder,
    untied_decoder,
)
from elip_models.models.layers.losses import language_loss, next_rows, next_tokens
from elip_models.models.momentum_model import MomentumModel, Negatives


@dataclass
class BLIPOutput:
    """loss: the sum of the three others, scalars. image_features, text_features: (B, E)."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_lm: Tensor
    image_features: Tensor
    text_features: Tensor


class BLIP(Reader, Captioner, MomentumModel):
    """Image and text towers, decoder, their momentum copies and the feature queue."""

    family = "blip"
    config_class = BLIPConfig
    config: BLIPConfig
    encoders: BLIPEncoders

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config, BLIPEncoders(config))
        self.text_reduction = config.text_token_reduction
        text = self.encoders.text
        self.decoder = tied_decoder(text) if config.tie_decoder else untied_decoder(text)
        self.language_head = masked_language_head(self.decoder)

    @property
    def text_towers(self) -> tuple[BertTower, ...]:
        return self.encoders.text, self.decoder

    def read_pairs(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """images, input_ids, mask -> (B, K, D), the texts alone, half way without the tokens that
        `text_reduction` drops.
        """
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
        hidden = tower.embed(begin_with(text, self.config.encoder_token_id))
        return tower.run_reduced(
            hidden, mask, layers, self.text_reduction, image, image_mask
        ).tokens

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        drawn: Negatives | None = None,
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
            drawn = self.draw_negatives(seen.similar)
        text, image = (input_ids, attention_mask), (seen.image, seen.image_mask)
        loss_itm = self.matching_loss(*text, seen.image, drawn, image_mask=seen.image_mask)
        written = self.decode(*text, image, self.text_reduction)
        loss_lm = language_loss(
            self.language_head(written.tokens),
            written.labels(next_tokens(*text)),
            smoothing=self.config.label_smoothing,
            gather=self.config.gather,
        )
        loss = seen.loss + loss_itm + loss_lm
        return BLIPOutput(loss, seen.loss, loss_itm, loss_lm, *seen.features)

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> Negatives:
        others = next_rows(len(images), images.device)
        return Negatives(others, others)
