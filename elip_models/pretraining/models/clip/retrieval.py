"""CLIP fine-tuned for image-text retrieval on images with several captions each.

The loss is ITC with soft targets: y = p over the batch, where p is uniform over the columns that
show the image of the row.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elip_models.pretraining.models.clip.model import CLIP, CLIPConfig, CLIPOutput
from elip_models.pretraining.models.layers.losses import contrastive_loss


@dataclass(frozen=True, kw_only=True)
class CLIPRetrievalConfig(CLIPConfig):
    """Hyper-parameters of CLIP for retrieval: see `CLIPConfig`; `loss` is 'itc'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "itc":
            raise ValueError(f"loss: expected 'itc' for retrieval, got {self.loss!r}")


class CLIPRetrieval(CLIP):
    """CLIP for which all captions of an image are positives."""

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
        """Return the loss of a batch; for the other arguments, see `CLIP.forward`.

        image_ids (B,) int64 are equal where two pairs show the same image.
        """
        output = super().forward(images, input_ids, attention_mask, guide_ids, guide_mask)
        features = output.image_features, output.text_features
        scale, gather = self.logit_scale.exp(), self.config.gather
        loss = contrastive_loss(*features, scale, gather=gather, image_ids=image_ids)
        return CLIPOutput(loss, *features)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class, a mask, and another `image_ids` for each pair."""
        ids = torch.arange(len(images), device=images.device)
        inputs = super().random_inputs(images)
        mask = torch.ones_like(inputs["input_ids"])
        return inputs | {"attention_mask": mask, "image_ids": ids}
