"""ALBEF with a text-guided, token-reduced image tower, for pre-training.

    text    BERT's first layers on the text alone; t_cls, their CLS output, guides the image tower
    image   ViT(image), reduced by ELIP under t_cls
    fusion  BERT's other layers on the text, with cross attention to the remaining image tokens
    loss    ITC (soft targets, queue) + ITM (hard negatives) + MLM (momentum distillation)

`models/momentum_model.py` defines ITC and ITM, `layers/losses.py` defines MLM.
Source: ALBEF (Li et al., 2021); ELIP, section 3, and its official ALBEF code.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from elip_models.pretraining.models.config import TokenId
from elip_models.pretraining.models.layers.bert import BertTower, masked_language_head
from elip_models.pretraining.models.layers.losses import language_loss, mask_tokens
from elip_models.pretraining.models.momentum_model import (
    ContrastiveOutput,
    Encoders,
    MomentumConfig,
    MomentumModel,
    MomentumOutput,
)
from elip_models.validation import PositiveInt, Share, Size, below


@dataclass(frozen=True, kw_only=True)
class ALBEFConfig(MomentumConfig):
    """Hyper-parameters of an ALBEF model; the defaults are the paper's.

    For the other fields, see `MomentumConfig`; alpha weights the momentum targets of ITC and MLM.

    Attributes:
        text_layers: the first layers of `text_depth`, which encode the text alone; the others fuse.
    """

    image_size: Size = 256
    captions: Literal["plain", "albef", "blip", "blip_question"] = "albef"
    text_layers: Annotated[PositiveInt, below("text_depth")] = 6
    mask_token_id: TokenId = 103
    mask_probability: Share = 0.15

    @property
    def fusion_layers(self) -> range:
        """Layers of the text encoder that attend to the image."""
        return range(self.text_layers, self.text_depth)


@dataclass
class ALBEFOutput(MomentumOutput):
    """Output of a step, with the loss of MLM."""

    loss_mlm: Tensor


class ALBEFDraw(NamedTuple):
    """Random choices of `forward`: those of `Negatives`, then the results of `mask_tokens`."""

    negative_images: Tensor
    negative_texts: Tensor
    masked_ids: Tensor
    labels: Tensor


class ALBEFTowers(Encoders):
    """Image tower, and BERT with cross attention in its last layers."""

    def __init__(self, config: ALBEFConfig, *, projects: bool = True) -> None:
        super().__init__(config, projects=projects)
        self.text_layers, self.fusion_layers = range(config.text_layers), config.fusion_layers
        self.text = BertTower(config.bert, cross_attention=self.fusion_layers)

    def encode_text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self.text.run(self.text.embed(input_ids), mask, self.text_layers)

    def fuse(self, hidden: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Fuse hidden states (B, L, D) with image tokens (B, N, D) -> (B, L, D)."""
        return self.text.run(hidden, mask, self.fusion_layers, image_tokens)


class ALBEFEncoders(ALBEFTowers):
    """Parts that have a momentum copy, here with the language head."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__(config)
        self.language_head = masked_language_head(self.text)

    def predict(self, input_ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Return logits (B, L, V) of the tokens of a text fused with its image, see `fuse`."""
        return self.language_head(self.fuse(self.encode_text(input_ids, mask), mask, image_tokens))


class ALBEFMatcher(MomentumModel):
    """ALBEF for ITC and ITM: towers, fusion layers, momentum copies and the feature queue."""

    encoders_class: ClassVar[type[ALBEFTowers]] = ALBEFTowers

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__(config, self.encoders_class(config))

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Return texts (B, L, D) fused with image tokens (B, N, D), see `ALBEFTowers.fuse`."""
        return self.encoders.fuse(text, mask, image)


class ALBEF(ALBEFMatcher):
    """Matcher with the language head, for pre-training."""

    family = "albef"
    config_class = ALBEFConfig
    encoders_class = ALBEFEncoders
    output_class = ALBEFOutput

    def language_losses(
        self, input_ids: Tensor, mask: Tensor, contrast: ContrastiveOutput, drawn: ALBEFDraw
    ) -> tuple[Tensor, ...]:
        """Return MLM with the targets of the momentum encoders."""
        logits = self.encoders.predict(drawn.masked_ids, mask, contrast.image)
        with torch.no_grad():
            teacher = self.encoders_m.predict(drawn.masked_ids, mask, contrast.image_m)
        gather = self.config.gather
        return (language_loss(logits, drawn.labels, teacher, self.alpha, gather=gather),)

    def draw(
        self,
        similar: tuple[Tensor, Tensor],
        input_ids: Tensor,
        image_ids: Tensor | None = None,
    ) -> ALBEFDraw:
        """Draw hard negatives and masked tokens; [SEP] can be masked, as in the official code."""
        config = self.config
        masked = mask_tokens(
            input_ids,
            mask_token_id=config.mask_token_id,
            special_token_ids=(config.pad_token_id, config.cls_token_id),
            vocab_size=config.vocab_size,
            probability=config.mask_probability,
        )
        return ALBEFDraw(*super().draw(similar, input_ids, image_ids), *masked)
