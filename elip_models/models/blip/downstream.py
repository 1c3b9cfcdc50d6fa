"""What BLIP's models of tasks share: the image tower, and how the text of a task guides it.

The image tower keeps all patches unless the config reduces it. Where a text guides the reduction,
that is the question or statement, which is read alone first; without guidance no text is.
"""

from dataclasses import dataclass
from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from elip_models.models.blip.base import BLIPBase, BLIPConfig, BLIPEncoders, Reader
from elip_models.models.distilled_model import DistilledModel, Encoders, Masked
from elip_models.reduction.scorers import ScorerName
from elip_models.reduction.strategy import mask_after
from elip_models.towers.base import scoring_context
from elip_models.validation import Rate, Zero


@dataclass(frozen=True, kw_only=True)
class BLIPTaskConfig(BLIPConfig):
    """Hyper-parameters of a BLIP that is fine-tuned; the defaults are the original's.

    drop_path: rate at which the last block of the image tower is passed by; 0 at the first one.
    The other fields: see `BLIPConfig`. Texts lose no tokens here, and `tie_decoder` says nothing:
    what writes has weights of its own.
    """

    drop_path: Rate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_reduction is not None:
            raise ValueError(
                "text_reduction: expected None, for a fine-tuned BLIP reads all tokens of a text, "
                f"got {self.text_reduction!r}"
            )

    def vit(self, **options: Any) -> VisionTransformer:
        return super().vit(drop_path_rate=self.drop_path, **options)


@dataclass(frozen=True, kw_only=True)
class BLIPAloneConfig(BLIPTaskConfig):
    """Hyper-parameters of a BLIP that nothing follows by momentum: see `BLIPTaskConfig`.

    The text that comes with an image guides it, where text guides the reduction. The fields of
    momentum encoders, features and their queue say nothing here.
    """

    scorer: ScorerName = "exact"
    guide: Literal["own"] = "own"
    guide_negatives: Zero = 0.0
    momentum_reduction: Literal["none"] = "none"


class BLIPTask(BLIPBase, DistilledModel):
    """A BLIP that nothing follows by momentum, and whose features are not compared."""

    config: BLIPAloneConfig
    ranks = False

    def __init__(self, config: BLIPAloneConfig, encoders: Encoders) -> None:
        super().__init__(config, encoders, distill=False)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        return {"images": images, **self.random_text(images)}


class BLIPReadingTask(Reader, BLIPTask):
    """The image tower, and the encoder that reads the text of a task."""

    encoders: BLIPEncoders

    def task_guides(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Read the texts of a task, input_ids, mask (B, L) -> what guides their images (B, D),
        without gradient; None where no text guides.
        """
        if not self.reduction.is_guided:
            return None
        with scoring_context(self, input_ids):
            text_cls = self.text_cls(input_ids, mask)
        return self.select_guidance(text_cls)

    def see(self, images: Tensor, guides: Tensor | None) -> Masked:
        """Images (B, 3, H, W), guided by (B, D) or by nothing -> tokens (B, N, D) and which of them
        are real, None where all are.
        """
        tokens, infos = self.encode_image(images, guides)
        return tokens, mask_after(infos)


def under(parts: tuple[str, ...], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the weights whose names begin with one of the parts."""
    return {name: weight for name, weight in weights.items() if name.startswith(parts)}


def decoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of decoder and head, complete: what the decoder shared with the encoder, and so was
    written under the encoder's name alone, is a copy; all of it, where there was no decoder.
    """
    encoder = under(("encoders.text.",), weights)
    shared = {name.replace("encoders.text.", "decoder.", 1): w for name, w in encoder.items()}
    return shared | under(("decoder.", "language_head."), weights)
