"""CLIP's image tower as a classifier: a linear head on its CLS token.

    feature   f = x_cls behind the tower's last norm, or f = normalise(W_i x_cls)
    logits    W f + b
    loss      cross entropy, with label smoothing

No text is read: the tower is dense, or reduced by the image alone. A linear probe reads x_cls
before the projection, as CLIP's own do, and without the batch norm that MAE puts in front of its
head: the tower's last norm is there.
Source: CLIP (Radford et al., 2021), appendix A.3; MAE (He et al., 2022); ELIP, section 4.3.1. The
head that begins as a zero-shot classifier: WiSE-FT (Wortsman et al., 2022).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.models.base import PretrainedModel
from elip_models.models.clip.model import CLIP, CLIPConfig
from elip_models.models.task_output import TaskOutput
from elip_models.reduction.encode import run_tower
from elip_models.validation import Share, Size, Zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_STD = 0.01  # MAE's


@dataclass(frozen=True, kw_only=True)
class CLIPClassificationConfig(CLIPConfig):
    """Hyper-parameters of a classifier, beside those of the model that it begins as.

    num_classes: as many as ImageNet has.
    tuning: 'full' trains all, 'probe' the head alone, on a tower that is frozen in eval mode.
    projects: the head reads the features that are compared with texts, so that it can begin as
        `begin_zero_shot_` says.
    label_smoothing: of the cross entropy.
    without_text: 'vision' lets a schedule reduce by the image alone, for there is no text.
    The other fields: see `CLIPConfig`; those of texts are not read, and no text guides.
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
    """Image tower, the projection where the head reads it, and the head."""

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
    def from_pretraining(
        cls, weights: dict[str, Tensor], config: CLIPClassificationConfig
    ) -> dict[str, Tensor]:
        """The image tower, and its projection where the head reads it; the head is new."""
        kept = ("visual.", "image_projection.") if config.projects else ("visual.",)
        return {name: weight for name, weight in weights.items() if name.startswith(kept)}

    @torch.no_grad()
    def begin_zero_shot_(self, classes: Tensor, scale: Tensor | float) -> None:
        """Make the head a zero-shot classifier, whose logits are the similarities to the classes.

        Args:
            classes: (num_classes, E), normalised features of their texts, as `class_features` of
                `tasks/zero_shot.py` makes them with the pre-trained model.
            scale: the inverse temperature of that model, `logit_scale.exp()`.

        Raises:
            ValueError: features of another shape, or a head that does not read projected ones.
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
        """As any module; the tower of a probe stays in eval mode."""
        super().train(mode)
        if self.config.tuning == "probe":
            self.visual.eval()
        return self

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        labels = torch.randint(self.config.num_classes, (len(images),), device=images.device)
        return {"images": images, "labels": labels}

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what the head reads, (B, D), or (B, E) normalised; of a probe
        without gradient.
        """
        grad = torch.is_grad_enabled() and self.config.tuning == "full"
        with torch.set_grad_enabled(grad):
            tokens, _ = run_tower(self.tower, images, None, self.reduction, cls_only=True)
            if self.image_projection is None:
                return tokens[:, 0]
            return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, num_classes)."""
        return self.head(self.features(images))

    def forward(self, images: Tensor, labels: Tensor) -> TaskOutput:
        """Classify images (B, 3, H, W), whose classes are labels (B,) int64."""
        logits = self.logits(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        return TaskOutput(loss, logits)

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Nothing: no text is read."""
        return {}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of saving their activations."""
        self.visual.set_grad_checkpointing(enable)
