"""CLIP fine-tuned for retrieval: ITC of captions of which several belong to one image.

y = p over the batch, p uniform over the columns that show the row's image
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elip_models.models.clip.model import CLIP, CLIPConfig, CLIPOutput
from elip_models.models.layers.losses import contrastive_loss


@dataclass(frozen=True, kw_only=True)
class CLIPRetrievalConfig(CLIPConfig):
    """As `CLIPConfig`; the loss is 'itc'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "itc":
            raise ValueError(f"loss: expected 'itc' for retrieval, got {self.loss!r}")


class CLIPRetrieval(CLIP):
    """CLIP, whose other captions of an image are no negatives of it."""

    family = "clip_retrieval"
    task: ClassVar[str] = "retrieval"
    config_class = CLIPRetrievalConfig
    pretraining = CLIP

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
    ) -> CLIPOutput:
        """As of `CLIP`; image_ids (B,) int64 are equal where two pairs show the same image."""
        output = super().forward(images, input_ids, attention_mask, guide_ids, guide_mask)
        features = output.image_features, output.text_features
        scale, gather = self.logit_scale.exp(), self.config.gather
        loss = contrastive_loss(*features, scale, gather=gather, image_ids=image_ids)
        return CLIPOutput(loss, *features)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also each pair's image, of its own."""
        ids = torch.arange(len(images), device=images.device)
        inputs = super().random_inputs(images)
        mask = torch.ones_like(inputs["input_ids"])
        return inputs | {"attention_mask": mask, "image_ids": ids}
