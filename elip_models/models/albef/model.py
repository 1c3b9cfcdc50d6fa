"""ALBEF with a text-guided, token-reduced image tower.

    text    BERT's first layers on the text alone; their CLS output guides the image tower
    image   ViT reduced by ELIP; features of both towers
    fusion  BERT's other layers, text attending to the image tokens
    loss    ITC (soft targets, queue) + ITM (hard negatives) + MLM (momentum distillation)

Source: ALBEF (Li et al., 2021); ELIP, section 3 and its official ALBEF code.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from elip_models.models.config import TokenId
from elip_models.models.layers.bert import BertTower, masked_language_head
from elip_models.models.layers.losses import (
    distilled_language_loss,
    mask_every_seventh,
    mask_tokens,
    next_rows,
)
from elip_models.models.momentum_model import Encoders, MomentumConfig, MomentumModel
from elip_models.validation import PositiveInt, Share, Size, below


@dataclass(frozen=True, kw_only=True)
class ALBEFConfig(MomentumConfig):
    """Hyper-parameters of an ALBEF model; the defaults are the paper's.

    text_layers: of `text_depth` layers, those that read the text alone; the others fuse.
    The other fields: see `MomentumConfig`; alpha weighs the momentum targets of ITC and MLM.
    """

    image_size: Size = 256
    captions: Literal["plain", "albef", "blip"] = "albef"
    text_layers: Annotated[PositiveInt, below("text_depth")] = 6
    mask_token_id: TokenId = 103
    mask_probability: Share = 0.15

    @property
    def fusion_layers(self) -> range:
        """The layers of the text encoder that see the image."""
        return range(self.text_layers, self.text_depth)


@dataclass
class ALBEFOutput:
    """loss: the sum of the three others, scalars. image_features, text_features: (B, E)."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_mlm: Tensor
    image_features: Tensor
    text_features: Tensor


class ALBEFDraw(NamedTuple):
    """What `forward` draws at random, for a caller that has drawn it.

    negative_images: (B,) for each text. negative_texts: (B,) for each image; both number the pairs
        of all ranks where gather='global'.
    masked_ids, labels: (B, L), see `mask_tokens`.
    """

    negative_images: Tensor
    negative_texts: Tensor
    masked_ids: Tensor
    labels: Tensor


class ALBEFTowers(Encoders):
    """Image tower and BERT, whose last layers see the image."""

    def __init__(self, config: ALBEFConfig, *, projects: bool = True) -> None:
        super().__init__(config, projects=projects)
        self.reads, self.fuses = range(config.text_layers), config.fusion_layers
        self.text = BertTower(config.bert, cross_attention=self.fuses)

    def read(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids, mask (B, L) -> (B, L, D): the text alone."""
        return self.text.run(self.text.embed(input_ids), mask, self.reads)

    def fuse(
        self, hidden: Tensor, mask: Tensor, image_tokens: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden (B, L, D) attends to image_tokens (B, N, D) where image_mask (B, N) says that they
        are real, or to all -> (B, L, D).
        """
        return self.text.run(hidden, mask, self.fuses, image_tokens, image_mask)


class ALBEFEncoders(ALBEFTowers):
    """The parts that have a momentum copy; here the language head is one of them."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__(config)
        self.language_head = masked_language_head(self.text)

    def predict(
        self,
        input_ids: Tensor,
        mask: Tensor,
        image_tokens: Tensor,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the tokens of a text that sees the image, as `fuse` -> logits (B, L, V)."""
        hidden = self.fuse(self.read(input_ids, mask), mask, image_tokens, image_mask)
        return self.language_head(hidden)


class ALBEF(MomentumModel):
    """Image and text towers, fusion layers, their momentum copies and the feature queue."""

    family = "albef"
    config_class = ALBEFConfig
    config: ALBEFConfig
    encoders_class: ClassVar[type[ALBEFTowers]] = ALBEFEncoders
    encoders: ALBEFEncoders

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__(config, self.encoders_class(config))

    def fuse(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Text (B, L, D), mask (B, L), image (B, N, D) and image_mask (B, N), None where all are
        real -> (B, L, D) of the fusion layers.
        """
        return self.encoders.fuse(text, mask, image, image_mask)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        drawn: ALBEFDraw | None = None,
    ) -> ALBEFOutput:
        """Compute pre-training losses of a batch of pairs; in training momentum and queue move on.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            guide_ids, guide_mask: (B, L), other captions of the images, where the config says
                guide='other'.
            drawn: negatives and masked tokens instead of drawing them, so that a run can be
                repeated by another implementation.
        """
        seen = self.contrast(images, input_ids, attention_mask, guide_ids, guide_mask)
        if drawn is None:
            drawn = self._draw(seen.similar, input_ids)
        loss_itm = self.matching_loss(
            seen.text, attention_mask, seen.image, drawn[:2], image_mask=seen.image_mask
        )
        text = drawn.masked_ids, attention_mask
        logits = self.encoders.predict(*text, seen.image, seen.image_mask)
        with torch.no_grad():
            teacher = self.encoders_m.predict(*text, seen.image_m, seen.image_mask_m)
        loss_mlm = distilled_language_loss(
            logits, drawn.labels, teacher, self.alpha, gather=self.config.gather
        )
        loss = seen.loss + loss_itm + loss_mlm
        return ALBEFOutput(loss, seen.loss, loss_itm, loss_mlm, *seen.features)

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> ALBEFDraw:
        others = next_rows(len(images), images.device)
        return ALBEFDraw(others, others, *mask_every_seventh(input_ids, self.config.mask_token_id))

    def _draw(self, similar: tuple[Tensor, Tensor], input_ids: Tensor) -> ALBEFDraw:
        """Draw hard negatives by the similarities (B, C), and masked tokens, of which [SEP] may be
        one, as in the official code.
        """
        config = self.config
        masked = mask_tokens(
            input_ids,
            mask_token_id=config.mask_token_id,
            special_token_ids=(config.pad_token_id, config.cls_token_id),
            vocab_size=config.vocab_size,
            probability=config.mask_probability,
        )
        return ALBEFDraw(*self.draw_negatives(similar), *masked)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        self.encoders.visual.set_grad_checkpointing(enable)
        self.encoders.text.set_grad_checkpointing(enable)
