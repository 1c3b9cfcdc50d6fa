"""Image-text retrieval by ALBEF and BLIP: ITC and ITM, where an image has several captions.

    ITC   y = alpha softmax(s_m) + (1 - alpha) p over [batch | queue], p uniform over the columns
          that show the row's image
    ITM   negatives never show the row's image

Source: the official codes' models/model_retrieval.py (ALBEF) and models/blip_retrieval.py (BLIP).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elip_models.models.distilled_model import MomentumConfig
from elip_models.models.layers.distillation import Weights, encoders_from_pretraining
from elip_models.models.layers.losses import next_rows
from elip_models.models.momentum_model import MomentumModel, Negatives


@dataclass
class RetrievalOutput:
    """loss: the sum of the two others, scalars. image_features, text_features: (B, E)."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    image_features: Tensor
    text_features: Tensor


class MomentumRetrieval(MomentumModel):
    """Fine-tuning of a momentum model on captions of which several belong to one image.

    Comes before the pre-training class among the bases of a model.
    """

    task: ClassVar[str] = "retrieval"
    knows_images = True

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        *,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        drawn: Negatives | None = None,
    ) -> RetrievalOutput:
        """Compute the losses of a batch of pairs; in training momentum and queue move on.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            image_ids: (B,) int64, at least 0, equal where two pairs show the same image.
            guide_ids, guide_mask: (B, L), other captions of the images, where the config says
                guide='other'.
            drawn: negatives instead of drawing them, so that a run can be repeated by another
                implementation.
        """
        text = input_ids, attention_mask
        seen = self.contrast(images, *text, guide_ids, guide_mask, image_ids)
        if drawn is None:
            drawn = self.draw_negatives(seen.similar, image_ids)
        fused = input_ids if self.fuses_ids else seen.text
        loss_itm = self.matching_loss(
            fused, attention_mask, seen.image, drawn, image_mask=seen.image_mask
        )
        return RetrievalOutput(seen.loss + loss_itm, seen.loss, loss_itm, *seen.features)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also each pair's image, of its own."""
        ids = torch.arange(len(images), device=images.device)
        return super().random_inputs(images) | {"image_ids": ids}

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> Negatives:
        others = next_rows(len(images), images.device)
        return Negatives(others, others)


def retrieval_from_pretraining(
    weights: Weights, config: MomentumConfig, begin: Callable[[Weights], Weights]
) -> Weights:
    """Begin retrieval as pre-training ended, its queue too where it is as long, whose images are
    none of the data's.

    Args:
        weights: by our names of pre-training.
        config: of the model that begins.
        begin: of the encoders, see `encoders_from_pretraining`.
    """
    kept = ["itm_head.", "temperature"]
    if "queue.image" in weights and weights["queue.image"].shape[1] == config.queue_size:
        kept.append("queue.")
    rest = {name: weight for name, weight in weights.items() if name.startswith(tuple(kept))}
    return encoders_from_pretraining(weights, begin) | rest
