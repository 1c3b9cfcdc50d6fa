"""Shared parts of the downstream models: outputs, momentum distillation, retrieval.

Retrieval by ALBEF and BLIP trains on images that have several captions each. The losses are those
of `models/momentum_model.py` with two changes:

    ITC   y = alpha softmax(s_m) + (1 - alpha) p over [batch | queue], where p is uniform over the
          columns that show the image of the row
    ITM   the negatives of a row never show the image of the row

Source: models/model_retrieval.py of ALBEF and models/blip_retrieval.py of BLIP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elip_models.models.distilled_model import MomentumConfig
from elip_models.models.layers.losses import next_rows
from elip_models.models.momentum_model import MomentumModel, Negatives

Weights = dict[str, Tensor]


@dataclass
class TaskOutput:
    """Output of a downstream model whose loss has one part.

    Attributes:
        loss: scalar.
        logits: (B, num_classes) of the classes, or (.., L, V) of each next token.
    """

    loss: Tensor
    logits: Tensor


@dataclass
class RetrievalOutput:
    """Output of a retrieval model: scalar losses and the features of the batch.

    Attributes:
        loss: the sum of the two other losses.
        image_features: (B, E), as `text_features`.
    """

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    image_features: Tensor
    text_features: Tensor


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(MomentumConfig):
    """Momentum distillation of a fine-tuned model; a base after the pre-training config.

    Attributes:
        distill: train on the predictions of the momentum encoders too, with the weight alpha.
    """

    distill: bool = True

    @property
    def full_alpha(self) -> float:
        """Weight of the momentum targets after its warm-up; 0 without distillation."""
        return self.alpha if self.distill else 0.0


class MomentumRetrieval(MomentumModel):
    """Fine-tuning of a momentum model on images with several captions each.

    A model lists this class before its pre-training class among its bases.
    """

    task: ClassVar[str] = "retrieval"
    stores_image_ids = True

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
        """Return the losses of a batch of pairs; in training, update momentum encoders and queue.

        `drawn` replaces random negatives, to repeat the step of another implementation. For the
        other arguments, see `contrast`.
        """
        text = input_ids, attention_mask
        contrast = self.contrast(images, *text, guide_ids, guide_mask, image_ids)
        if drawn is None:
            drawn = self.draw_negatives(contrast.similar, image_ids)
        fused = input_ids if self.fuses_ids else contrast.text
        loss_itm = self.matching_loss(
            fused, attention_mask, contrast.image, drawn, image_mask=contrast.image_mask
        )
        loss = contrast.loss + loss_itm
        return RetrievalOutput(loss, contrast.loss, loss_itm, *contrast.features)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class and `image_ids`, another one for each pair."""
        ids = torch.arange(len(images), device=images.device)
        return super().random_inputs(images) | {"image_ids": ids}

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> Negatives:
        """Return the next pair of the batch as the negative of each pair."""
        others = next_rows(len(images), images.device)
        return Negatives(others, others)


def select_parts(weights: Weights, *prefixes: str) -> Weights:
    """Return the weights whose names start with one of the prefixes."""
    return {name: weight for name, weight in weights.items() if name.startswith(prefixes)}


def encoder_weights(
    weights: Weights, convert: Callable[[Weights], Weights], *, distill: bool = True
) -> Weights:
    """Return pre-trained weights for the encoders and their momentum copies.

    Where pre-training stored no momentum weight, the copy gets the weight of the encoder.

    Args:
        weights: of the pre-trained model, by its names.
        convert: maps weights of the pre-trained encoders to the names inside the new encoders.
        distill: whether the new model has momentum copies.

    Returns:
        Weights by the names of the new model.
    """
    online = _strip_prefix(weights, "encoders.")
    found = {f"encoders.{name}": weight for name, weight in convert(online).items()}
    if not distill:
        return found
    copies = convert(online | _strip_prefix(weights, "encoders_m."))
    return found | {f"encoders_m.{name}": weight for name, weight in copies.items()}


def retrieval_weights(
    weights: Weights, config: MomentumConfig, convert: Callable[[Weights], Weights]
) -> Weights:
    """Return pre-trained weights for a retrieval model.

    The queue is kept if both models have the same queue size. Its features have no image id, so
    they are negatives of all pairs.

    Args:
        weights: of the pre-trained model, by its names.
        config: of the retrieval model.
        convert: see `encoder_weights`.
    """
    prefixes = ["itm_head.", "temperature"]
    if "queue.image" in weights and weights["queue.image"].shape[1] == config.queue_size:
        prefixes.append("queue.")
    return encoder_weights(weights, convert) | select_parts(weights, *prefixes)


def _strip_prefix(weights: Weights, prefix: str) -> Weights:
    """Return the weights whose names start with the prefix, without the prefix."""
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
