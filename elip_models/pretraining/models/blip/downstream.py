"""Base of the fine-tuned BLIP models: image tower, and guidance by the text of the task.

The image tower keeps all patches unless the config reduces it. If text guides the reduction, the
text tower encodes the question or statement alone first. Otherwise it skips this pass.
"""

from dataclasses import dataclass
from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from elip_models.pretraining.models.blip.base import (
    BLIPBase,
    BLIPConfig,
    BLIPEncoders,
    BLIPWithEncoder,
)
from elip_models.pretraining.models.distilled_model import DistilledModel, Encoders
from elip_models.pretraining.models.downstream import Weights, select_parts
from elip_models.reduction.scorers import ScorerName
from elip_models.towers.base import scoring_context
from elip_models.validation import Rate, Zero


@dataclass(frozen=True, kw_only=True)
class BLIPFinetuningConfig(BLIPConfig):
    """Hyper-parameters of a fine-tuned BLIP; the defaults are the original's.

    For the other fields, see `BLIPConfig`. Text reduction is not available. `tie_decoder` has no
    effect, since a decoder has its own weights.

    Attributes:
        drop_path: stochastic depth rate of the last block of the image tower; linear from 0.
    """

    drop_path: Rate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_reduction is not None:
            raise ValueError(
                "text_reduction: expected None, since a fine-tuned BLIP needs all text tokens, got "
                f"{self.text_reduction!r}"
            )

    def vit(self, **options: Any) -> VisionTransformer:
        """Create the image tower with stochastic depth."""
        return super().vit(drop_path_rate=self.drop_path, **options)


@dataclass(frozen=True, kw_only=True)
class BLIPTaskConfig(BLIPFinetuningConfig):
    """Hyper-parameters of a BLIP without momentum encoders: see `BLIPFinetuningConfig`.

    Each text guides its own image. The fields of momentum encoders, features and their queue have
    no effect.
    """

    scorer: ScorerName = "exact"
    guide: Literal["own"] = "own"
    guide_negatives: Zero = 0.0
    momentum_reduction: Literal["none"] = "none"


class BLIPTask(BLIPBase, DistilledModel):
    """BLIP without momentum encoders and without contrastive features."""

    config: BLIPTaskConfig
    ranks = False

    def __init__(self, config: BLIPTaskConfig, encoders: Encoders) -> None:
        super().__init__(config, encoders, distill=False)


class BLIPEncoderTask(BLIPWithEncoder, BLIPTask):
    """BLIP whose encoder fuses the text of a task with its image."""

    encoders: BLIPEncoders

    def text_guidance(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return the guidance (B, D) of texts (B, L), without gradient; None if no text guides."""
        if not self.reduction.is_guided:
            return None
        with scoring_context(self, input_ids):
            text_cls = self.text_cls(input_ids, mask)
        return self.select_guidance(text_cls)


def decoder_weights(weights: Weights) -> Weights:
    """Return pre-trained weights for a decoder with its own weights, and for its head.

    Weights that both shared, or all if pre-training had no decoder, have the encoder's name.
    """
    encoder = select_parts(weights, "encoders.text.")
    shared = {name.replace("encoders.text.", "decoder.", 1): w for name, w in encoder.items()}
    return shared | select_parts(weights, "decoder.", "language_head.")
