"""BLIP with a text-guided, token-reduced image tower, for pre-training.

    text     BERT on the text alone; t_cls, its CLS output, guides the image tower
    image    ViT(image), reduced by ELIP under t_cls
    encoder  the same BERT on [ENC] and the text, with cross attention to the image tokens
    decoder  causal BERT on [DEC] and the text; only its self-attention has its own weights
    loss     ITC (soft targets, queue) + ITM (hard negatives) + LM (label smoothing)

`models/momentum_model.py` defines ITC and ITM, `layers/losses.py` defines LM.
Source: BLIP (Li et al., 2022); ELIP, section 3, and its official BLIP code.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from elip_models.pretraining.models.blip.base import (
    BLIPCaptioner,
    BLIPConfig,
    BLIPEncoders,
    BLIPWithEncoder,
    replace_first_token,
)
from elip_models.pretraining.models.layers.bert import masked_language_head, tied_decoder
from elip_models.pretraining.models.layers.losses import language_loss, next_tokens
from elip_models.pretraining.models.momentum_model import MomentumModel, MomentumOutput, Negatives


@dataclass
class BLIPOutput(MomentumOutput):
    """Output of a step, with the loss of LM."""

    loss_lm: Tensor


class BLIP(BLIPWithEncoder, BLIPCaptioner, MomentumModel):
    """Image and text towers, decoder, momentum copies of the towers, and the feature queue."""

    family = "blip"
    config_class = BLIPConfig
    config: BLIPConfig
    encoders: BLIPEncoders

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config, BLIPEncoders(config))
        self.text_reduction = config.text_token_reduction
        text = self.encoders.text
        self.decoder = tied_decoder(text) if config.tie_decoder else copy.deepcopy(text)
        self.language_head = masked_language_head(self.decoder)

    def encode_text_reduced(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encode texts alone -> (B, K, D), without the tokens that `text_reduction` drops."""
        image_cls = self.dense_cls(images) if self.config.image_guides_text else None
        return self._run_text(input_ids, mask, image_cls=image_cls)

    def fuse_reduced(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None
    ) -> Tensor:
        """Fuse texts with images -> (B, K, D), without the tokens that `text_reduction` drops."""
        ids = replace_first_token(text, self.config.encoder_token_id)
        return self._run_text(ids, mask, image, image_mask)

    def _run_text(self, ids: Tensor, mask: Tensor, *image: Tensor | None, **options: Any) -> Tensor:
        tower, layers = self.encoders.text, self.encoders.layers
        hidden, reduction = tower.embed(ids), self.text_reduction
        return tower.run_reduced(hidden, mask, layers, reduction, *image, **options).tokens

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
        """Return the losses of a batch of pairs; in training, update momentum encoders and queue.

        Only this method drops text tokens by `config.text_reduction`, in ITC, ITM and LM. 'learned'
        adds a dense forward of the image tower before the text, without gradient. `drawn` replaces
        random negatives, to repeat the step of another implementation. For the other arguments, see
        `contrast`.
        """
        contrast = self.contrast(images, input_ids, attention_mask, guide_ids, guide_mask)
        if drawn is None:
            drawn = self.draw_negatives(contrast.similar)
        text, image = (input_ids, attention_mask), (contrast.image, contrast.image_mask)
        loss_itm = self.matching_loss(*text, contrast.image, drawn, image_mask=contrast.image_mask)
        decoded = self.decode(*text, image, self.text_reduction)
        loss_lm = language_loss(
            self.language_head(decoded.tokens),
            decoded.labels(next_tokens(*text)),
            smoothing=self.config.label_smoothing,
            gather=self.config.gather,
        )
        loss = contrast.loss + loss_itm + loss_lm
        return BLIPOutput(loss, contrast.loss, loss_itm, *contrast.features, loss_lm)
