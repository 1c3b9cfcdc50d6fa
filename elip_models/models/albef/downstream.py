"""What ALBEF's VQA, entailment and NLVR2 share: a text that saw its image, and momentum copies of
the encoders whose answers are targets too.

Source: the official code's models/model_vqa.py, model_ve.py and model_nlvr.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from elip_models.models.albef.model import ALBEF, ALBEFConfig, ALBEFTowers
from elip_models.models.distilled_model import DistilledModel
from elip_models.models.downstream import (
    DistillationConfig,
    Weights,
    encoders_from_pretraining,
)
from elip_models.models.layers.losses import at_least_fp32, distilled_cross_entropy
from elip_models.models.downstream import TaskOutput
from elip_models.reduction.strategy import mask_after
from elip_models.validation import Size, Zero


@dataclass(frozen=True, kw_only=True)
class ALBEFTaskConfig(ALBEFConfig, DistillationConfig):
    """Hyper-parameters of an ALBEF that answers; the defaults are the official code's.

    The fields: see `DistillationConfig` and `ALBEFConfig`, of which those of features, their queue
    and masked tokens say nothing here. The text that comes with an image guides it, where the image
    tower is reduced.
    """

    image_size: Size = 384
    guide: Literal["own"] = "own"
    guide_negatives: Zero = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distill and (self.scorer == "momentum" or self.momentum_reduction != "none"):
            raise ValueError(
                "distill: expected True with scorer='momentum' or a momentum_reduction, which read "
                "the momentum encoders, got False"
            )


class ALBEFTask(DistilledModel):
    """An ALBEF without features and their queue, whose fused text a head reads."""

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
    def from_pretraining(
        cls, weights: dict[str, Tensor], config: ALBEFTaskConfig
    ) -> dict[str, Tensor]:
        """Weights of an `ALBEF` by its names -> those that the model begins with, by its own; its
        momentum encoders as those of pre-training, where `weights` has them.
        """
        begin = partial(cls.encoders_from_pretraining, config=config)
        return encoders_from_pretraining(weights, begin, distill=config.distill)

    @classmethod
    def encoders_from_pretraining(cls, weights: Weights, config: ALBEFTaskConfig) -> Weights:
        """Weights of pre-training's encoders -> of these, by the names inside them."""
        return {n: w for n, w in weights.items() if n.startswith(("visual.", "text."))}

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        return {"images": images, **self.random_text(images)}

    def shown(self, images: Tensor, text_cls: Tensor) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W) that the image tower sees, and what guides each (B, D)."""
        return images, text_cls

    def read(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Read texts (B, L) that see their images -> (B, L, D); nothing is drawn or distilled."""
        text = self.encode_text(input_ids, mask)
        image, infos = self.encode_image(*self.shown(images, text[:, 0]))
        return self.encoders.fuse(text, mask, image, mask_after(infos))

    def read_twice(
        self, images: Tensor, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `read`, in a step, also by the momentum encoders, which move on in training; None
        without them.
        """
        text, momentum = self.encode_text(input_ids, mask), self.encoders_m
        shown = self.shown(images, self.select_guidance(text[:, 0]))
        if momentum is None:
            image, infos = self.encode_image(*shown)
            return self.encoders.fuse(text, mask, image, mask_after(infos)), None
        if self.training:
            self._follow()
        image, image_m = self._images(*shown)
        with torch.no_grad():
            fused_m = momentum.fuse(momentum.read(input_ids, mask), mask, *image_m)
        return self.encoders.fuse(text, mask, *image), fused_m

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        self.encoders.visual.set_grad_checkpointing(enable)
        self.encoders.text.set_grad_checkpointing(enable)


@dataclass(frozen=True, kw_only=True)
class ALBEFClassifierConfig(ALBEFTaskConfig):
    """num_classes: of the answers. The other fields: see `ALBEFTaskConfig`."""

    num_classes: Size


class ClassifierEncoders(ALBEFTowers):
    """The parts that have a momentum copy; the classifier is one of them."""

    def __init__(self, config: ALBEFClassifierConfig) -> None:
        super().__init__(config, projects=False)
        width = config.text_width
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.num_classes)
        )

    def classify(self, fused: Tensor) -> Tensor:
        """Fused (B, L, D) -> logits (B, num_classes), fp32, or fp64 as `fused`."""
        return at_least_fp32(self.classifier(fused[:, 0]))


class ALBEFClassifier(ALBEFTask):
    """An ALBEF that says to which class a text and what it sees belong."""

    encoders_class = ClassifierEncoders
    config: ALBEFClassifierConfig
    encoders: ClassifierEncoders
    encoders_m: ClassifierEncoders | None

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """images, input_ids, attention_mask as of `forward` -> (B, num_classes), fp32."""
        return self.encoders.classify(self.read(images, input_ids, attention_mask))

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> TaskOutput:
        """Compute the loss of a batch; in training the momentum encoders move on.

        Args:
            images: (B, 3, H, W), of NLVR2 (B, 2, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            labels: (B,) int64, the right classes.
        """
        fused, fused_m = self.read_twice(images, input_ids, attention_mask)
        logits, teacher = self.encoders.classify(fused), None
        if fused_m is not None:
            with torch.no_grad():
                teacher = self.encoders_m.classify(fused_m)
        loss = distilled_cross_entropy(logits, labels, teacher, self.alpha).mean()
        return TaskOutput(loss, logits)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also labels."""
        labels = torch.arange(len(images), device=images.device) % self.config.num_classes
        return super().random_inputs(images) | {"labels": labels}
