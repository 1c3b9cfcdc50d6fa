"""Base of the fine-tuned ALBEF models: text fused with its image, and momentum distillation.

The text guides the image tower. A head reads the fused text. The momentum copies of the encoders
and of the head give soft targets (momentum distillation).

Source: models/model_vqa.py, model_ve.py and model_nlvr.py of ALBEF.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elip_models.pretraining.models.albef.model import ALBEF, ALBEFConfig, ALBEFTowers
from elip_models.pretraining.models.distilled_model import DistilledModel
from elip_models.pretraining.models.downstream import (
    DistillationConfig,
    Weights,
    encoder_weights,
    select_parts,
)
from elip_models.validation import Size, Zero


@dataclass(frozen=True, kw_only=True)
class ALBEFTaskConfig(ALBEFConfig, DistillationConfig):
    """Hyper-parameters of a fine-tuned ALBEF; the defaults are the official code's.

    Each text guides its own image. For the fields, see `DistillationConfig` and `ALBEFConfig`. The
    fields of the features, of their queue and of masked tokens have no effect.
    """

    image_size: Size = 384
    guide: Literal["own"] = "own"
    guide_negatives: Zero = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distill and (self.scorer == "momentum" or self.momentum_reduction != "none"):
            raise ValueError(
                "distill: expected True with scorer='momentum' or a momentum_reduction, which need "
                "the momentum encoders, got False"
            )


class ALBEFTask(DistilledModel):
    """ALBEF without contrastive features, with a head over the fused text."""

    task: ClassVar[str]
    pretraining: ClassVar[type[ALBEF]] = ALBEF
    encoders_class: ClassVar[type[ALBEFTowers]]
    config: ALBEFTaskConfig
    encoders: ALBEFTowers
    encoders_m: ALBEFTowers | None
    ranks = False

    def __init__(self, config: ALBEFTaskConfig) -> None:
        super().__init__(config, self.encoders_class(config), distill=config.distill)

    @classmethod
    def from_pretraining(cls, weights: Weights, config: ALBEFTaskConfig) -> Weights:
        """Map weights of a pre-trained `ALBEF`, and of its momentum encoders, to this model."""
        convert = partial(cls.convert_encoders, config=config)
        return encoder_weights(weights, convert, distill=config.distill)

    @classmethod
    def convert_encoders(cls, weights: Weights, config: ALBEFTaskConfig) -> Weights:
        """Map weights of the pre-trained encoders to the names inside the encoders here."""
        return select_parts(weights, "visual.", "text.")

    def tower_inputs(self, images: Tensor, text_cls: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (B, 3, H, W) for the image tower and the guidance (B, D) of each."""
        return images, text_cls

    def encode_pair(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Fuse texts (B, L) with their images -> (B, L, D), without sampling or distillation."""
        text = self.encode_text(input_ids, mask)
        image = self.encode_masked(*self.tower_inputs(images, text[:, 0]))
        return self.encoders.fuse(text, mask, *image)

    def encode_pair_with_momentum(
        self, images: Tensor, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Fuse texts with their images, for a loss, by the online and the momentum encoders.

        In training, this updates the momentum encoders first. Without them, the second result is
        None.
        """
        text, momentum = self.encode_text(input_ids, mask), self.encoders_m
        inputs = self.tower_inputs(images, self.select_guidance(text[:, 0]))
        if momentum is None:
            return self.encoders.fuse(text, mask, *self.encode_masked(*inputs)), None
        if self.training:
            self._update_momentum()
        image, image_m = self._encode_images(*inputs)
        with torch.no_grad():
            text_m = momentum.encode_text(input_ids, mask)
            fused_m = momentum.fuse(text_m, mask, *image_m)
        return self.encoders.fuse(text, mask, *image), fused_m
