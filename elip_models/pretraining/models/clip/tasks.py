"""CLIP fine-tuned for image-text retrieval and for image classification.

    retrieval       ITC with soft targets: y = p over the batch, where p is uniform over the columns
                    that show the image of the row, since each image has several captions
    classification  logits W x_cls + b, after the last norm of the tower; cross entropy, with label
                    smoothing

A classifier has no text: its tower is dense, or reduced by the image alone. A linear probe trains
the head alone, as in CLIP's own linear probes. MAE puts a batch norm in front of its head; here the
last norm of the tower replaces it.

Source: CLIP (Radford et al., 2021), appendix A.3; MAE (He et al., 2022); ELIP, section 4.3.1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.engine.encode import run_tower
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.clip.model import CLIP, CLIPConfig, CLIPOutput
from elip_models.pretraining.models.downstream import TaskOutput, Weights, renamed
from elip_models.pretraining.models.layers.losses import contrastive_loss
from elip_models.validation import Share, Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_STD = 0.01  # as in MAE


@dataclass(frozen=True, kw_only=True)
class CLIPRetrievalConfig(CLIPConfig):
    """Hyper-parameters of CLIP for retrieval: see `CLIPConfig`."""

    loss: Literal["itc"] = "itc"


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
    ) -> CLIPOutput:
        """Return the loss of a batch; for the other arguments, see `CLIP.forward`.

        image_ids (B,) int64 are equal where two pairs show the same image.
        """
        features = self.encode_pairs(images, input_ids, attention_mask)
        scale, gather = self.logit_scale.exp(), self.config.gather
        loss = contrastive_loss(*features, scale, gather=gather, image_ids=image_ids)
        return CLIPOutput(loss, *features)


@dataclass(frozen=True, kw_only=True)
class CLIPClassificationConfig(CLIPConfig):
    """Hyper-parameters of a classifier, besides those of the pre-trained model.

    For the other fields, see `CLIPConfig`; those of texts have no effect.

    Attributes:
        num_classes: number of classes; the default is ImageNet's.
        tuning: 'full' trains all weights, 'probe' the head alone, with a frozen tower in eval mode.
        label_smoothing: of the cross entropy.
        without_text: 'vision' lets a schedule reduce by the image alone.
    """

    num_classes: Size = 1000
    tuning: Literal["probe", "full"] = "full"
    label_smoothing: Share = 0.0
    without_text: Literal["dense", "vision"] = "vision"


class CLIPClassification(PretrainedModel):
    """Image tower and a linear head."""

    family, task = "clip_classification", "classification"
    config_class = CLIPClassificationConfig
    pretraining = CLIP
    ranks = False
    has_text = False

    def __init__(self, config: CLIPClassificationConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = config.vit()
        self.read_tower()
        self.head = nn.Linear(config.vision_width, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        if config.tuning == "probe":
            self.requires_grad_(False)
            self.head.requires_grad_()

    @classmethod
    def from_pretraining(cls, weights: Weights, config: CLIPClassificationConfig) -> Weights:
        """Select the weights of the image tower."""
        return renamed(weights, [("visual.",)])

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules, but keep the tower of a probe in eval mode."""
        super().train(mode)
        if self.config.tuning == "probe":
            self.visual.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Return the CLS tokens (B, D) of images (B, 3, H, W); without gradient for a probe."""
        grad = torch.is_grad_enabled() and self.config.tuning == "full"
        with torch.set_grad_enabled(grad):
            tokens, _ = run_tower(self.tower, images, None, self.reduction, cls_only=True)
        return tokens[:, 0]

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 3, H, W)."""
        return self.head(self.features(images))

    def forward(self, images: Tensor, labels: Tensor) -> TaskOutput:
        """Return the loss of images (B, 3, H, W) with the classes labels (B,) int64."""
        logits = self.logits(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        return TaskOutput(loss, logits)

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Return no config fields, since the model has no text."""
        return {}
