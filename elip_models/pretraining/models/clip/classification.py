"""CLIP's image tower as a classifier: a linear head on its CLS token.

    feature   f = x_cls after the last norm of the tower, or f = normalise(W_i x_cls)
    logits    W f + b
    loss      cross entropy, with label smoothing

There is no text: the tower is dense, or reduced by the image alone. A linear probe trains the head
alone, on x_cls before the projection, as in CLIP's own linear probes. MAE puts a batch norm in
front of its head; here the last norm of the tower replaces it.

Source: CLIP (Radford et al., 2021), appendix A.3; MAE (He et al., 2022); ELIP, section 4.3.1; for
a head that starts as a zero-shot classifier, WiSE-FT (Wortsman et al., 2022).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.clip.model import CLIP, CLIPConfig
from elip_models.pretraining.models.downstream import TaskOutput, Weights, select_parts
from elip_models.reduction.encode import run_tower
from elip_models.validation import Share, Size, Zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_STD = 0.01  # as in MAE


@dataclass(frozen=True, kw_only=True)
class CLIPClassificationConfig(CLIPConfig):
    """Hyper-parameters of a classifier, besides those of the pre-trained model.

    For the other fields, see `CLIPConfig`; those of texts and of guidance have no effect.

    Attributes:
        num_classes: number of classes; the default is ImageNet's.
        tuning: 'full' trains all weights, 'probe' the head alone, with a frozen tower in eval mode.
        projects: the head uses the features that are compared with texts, so that
            `init_zero_shot_head_` can initialise it.
        label_smoothing: of the cross entropy.
        without_text: 'vision' lets a schedule reduce by the image alone.
    """

    num_classes: Size = 1000
    tuning: Literal["probe", "full"] = "full"
    projects: bool = False
    label_smoothing: Share = 0.0
    without_text: Literal["dense", "vision"] = "vision"
    guide: Literal["own"] = "own"
    guide_negatives: Zero = 0.0
    guide_dropout: Zero = 0.0


class CLIPClassification(PretrainedModel):
    """Image tower, an optional projection, and a linear head."""

    family = "clip_classification"
    task = "classification"
    config_class = CLIPClassificationConfig
    pretraining = CLIP
    ranks = False
    has_text = False

    def __init__(self, config: CLIPClassificationConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = config.vit()
        self.read_tower()
        width = config.vision_width
        self.image_projection = None
        if config.projects:
            self.image_projection = nn.Linear(width, config.embed_dim, bias=False)
            nn.init.normal_(self.image_projection.weight, std=width**-0.5)
            width = config.embed_dim
        self.head = nn.Linear(width, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        if config.tuning == "probe":
            self.requires_grad_(False)
            self.head.requires_grad_()

    @classmethod
    def from_pretraining(cls, weights: Weights, config: CLIPClassificationConfig) -> Weights:
        """Select the weights of the image tower, and of its projection if the head uses it."""
        parts = ["visual.", "image_projection."] if config.projects else ["visual."]
        return select_parts(weights, *parts)

    @torch.no_grad()
    def init_zero_shot_head_(self, classes: Tensor, scale: Tensor | float) -> None:
        """Set the head to a zero-shot classifier: the logits are the similarities to the classes.

        classes (num_classes, E) are normalised text features, see `class_features` in
        `tasks/zero_shot.py`. `scale` is the inverse temperature of the pre-trained model,
        `logit_scale.exp()`. ValueError is raised for another shape, or if the config has
        projects=False.
        """
        expected = (self.config.num_classes, self.config.embed_dim)
        if not self.config.projects or tuple(classes.shape) != expected:
            raise ValueError(
                f"classes: expected features {expected} of texts, for a head with projects=True, "
                f"got {tuple(classes.shape)} and projects={self.config.projects}"
            )
        self.head.weight.copy_(scale * classes)
        self.head.bias.zero_()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules, but keep the tower of a probe in eval mode."""
        super().train(mode)
        if self.config.tuning == "probe":
            self.visual.eval()
        return self

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return images and a random label for each of them."""
        labels = torch.randint(self.config.num_classes, (len(images),), device=images.device)
        return {"images": images, "labels": labels}

    def features(self, images: Tensor) -> Tensor:
        """Return what the head uses: (B, D), or normalised (B, E); without gradient for a probe."""
        grad = torch.is_grad_enabled() and self.config.tuning == "full"
        with torch.set_grad_enabled(grad):
            tokens, _ = run_tower(self.tower, images, None, self.reduction, cls_only=True)
            if self.image_projection is None:
                return tokens[:, 0]
            return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

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
