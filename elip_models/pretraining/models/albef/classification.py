"""ALBEF fine-tuned for visual entailment (SNLI-VE) and for NLVR2, as classification.

    logits   W_2 relu(W_1 h_cls), where h is the text fused with its image
    loss     cross entropy, distilled from the momentum encoders

In NLVR2, the model classifies whether a statement about two images is true. The image tower encodes
both images, each guided by the statement. Each fusion layer becomes two layers, one for each image.
The two layers share the keys and values of their cross attention, and have their own self-attention
and MLP.

Source: models/model_ve.py, VE.py and configs/VE.yaml of ALBEF; models/model_nlvr.py, xbert.py,
NLVR.py and configs/NLVR.yaml. The official code duplicates the layers in Pretrain_nlvr.py, which
continues pre-training on pairs of images before fine-tuning.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from elip_models.pretraining.models.albef.downstream import ALBEFTask, ALBEFTaskConfig
from elip_models.pretraining.models.albef.model import ALBEFTowers
from elip_models.pretraining.models.downstream import TaskOutput, Weights
from elip_models.pretraining.models.layers.losses import at_least_fp32, distilled_cross_entropy
from elip_models.validation import NonNegative, Size

LAYERS = "text.layers."


@dataclass(frozen=True, kw_only=True)
class ALBEFClassifierConfig(ALBEFTaskConfig):
    """Hyper-parameters of an ALBEF classifier; other fields: see `ALBEFTaskConfig`."""

    num_classes: Size


class ClassifierEncoders(ALBEFTowers):
    """Parts that have a momentum copy: both towers and the classifier."""

    def __init__(self, config: ALBEFClassifierConfig) -> None:
        super().__init__(config, projects=False)
        width = config.text_width
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.num_classes)
        )

    def classify(self, fused: Tensor) -> Tensor:
        """Return logits (B, num_classes) of fused texts (B, L, D), in fp32 or in fp64."""
        return at_least_fp32(self.classifier(fused[:, 0]))


class ALBEFClassifier(ALBEFTask):
    """ALBEF with a classifier over the fused text."""

    encoders_class = ClassifierEncoders
    config: ALBEFClassifierConfig
    encoders: ClassifierEncoders
    encoders_m: ClassifierEncoders | None

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, num_classes) in fp32; the arguments are those of `forward`."""
        return self.encoders.classify(self.encode_pair(images, input_ids, attention_mask))

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> TaskOutput:
        """Return the loss of a batch; in training, update the momentum encoders.

        NLVR2 has images (B, 2, 3, H, W). labels (B,) int64 are the correct classes.
        """
        fused, fused_m = self.encode_pair_with_momentum(images, input_ids, attention_mask)
        logits, teacher = self.encoders.classify(fused), None
        if fused_m is not None:
            with torch.no_grad():
                teacher = self.encoders_m.classify(fused_m)
        loss = distilled_cross_entropy(logits, labels, teacher, self.alpha).mean()
        return TaskOutput(loss, logits)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class and labels."""
        labels = torch.arange(len(images), device=images.device) % self.config.num_classes
        return super().random_inputs(images) | {"labels": labels}


@dataclass(frozen=True, kw_only=True)
class ALBEFEntailmentConfig(ALBEFClassifierConfig):
    """Hyper-parameters of an ALBEF for entailment; the defaults are the official code's."""

    num_classes: Size = 3
    alpha_warmup_epochs: NonNegative = 0.0


class ALBEFEntailment(ALBEFClassifier):
    """ALBEF that classifies whether an image entails a hypothesis.

    The classes are entailment, neutral and contradiction, in reverse order of the official weights.
    """

    family = "albef_entailment"
    task = "entailment"
    config_class = ALBEFEntailmentConfig
    config: ALBEFEntailmentConfig


@dataclass(frozen=True, kw_only=True)
class ALBEFNLVR2Config(ALBEFClassifierConfig):
    """Hyper-parameters of an ALBEF for NLVR2; the defaults are the official code's.

    `text_depth` is the depth of the pre-trained model, whose fusion layers are duplicated here.
    """

    num_classes: Size = 2

    @property
    def fusion_layers(self) -> range:
        """Layers that attend to an image: twice those of the pre-trained model."""
        return range(self.text_layers, 2 * self.text_depth - self.text_layers)

    @property
    def bert(self) -> BertConfig:
        """Config of the text encoder with duplicated fusion layers."""
        bert = super().bert
        bert.num_hidden_layers = self.fusion_layers.stop
        return bert


class NLVR2Encoders(ClassifierEncoders):
    """Encoders whose fusion layers attend to the first and the second image in turn."""

    def __init__(self, config: ALBEFNLVR2Config) -> None:
        super().__init__(config)
        for i in self.fusion_layers[::2]:
            first, second = (self.text.layers[j].crossattention.self for j in (i, i + 1))
            first.key, first.value = second.key, second.value

    def fuse(
        self, hidden: Tensor, mask: Tensor, image_tokens: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Return texts (B, L, D) fused with image_tokens (2B, N, D), two images in a row each."""
        images = image_tokens[0::2], image_tokens[1::2]
        masks = (None, None) if image_mask is None else (image_mask[0::2], image_mask[1::2])
        for i in self.fusion_layers:
            turn = (i - self.fusion_layers.start) % 2
            hidden = self.text.run(hidden, mask, range(i, i + 1), images[turn], masks[turn])
        return hidden


class ALBEFNLVR2(ALBEFClassifier):
    """ALBEF that classifies a statement about two images as false (0) or true (1)."""

    family = "albef_nlvr2"
    task = "nlvr2"
    config_class = ALBEFNLVR2Config
    config: ALBEFNLVR2Config
    encoders_class = NLVR2Encoders
    encoders: NLVR2Encoders
    encoders_m: NLVR2Encoders | None

    @classmethod
    def convert_encoders(cls, weights: Weights, config: ALBEFNLVR2Config) -> Weights:
        """Copy each pre-trained fusion layer to the two layers that replace it."""
        found = {}
        for name, weight in super().convert_encoders(weights, config).items():
            number, _, rest = name.removeprefix(LAYERS).partition(".")
            names = [name]
            if name.startswith(LAYERS) and int(number) >= config.text_layers:
                first = 2 * int(number) - config.text_layers
                names = [f"{LAYERS}{i}.{rest}" for i in (first, first + 1)]
            found |= dict.fromkeys(names, weight)
        return found

    def tower_inputs(self, images: Tensor, text_cls: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten images (B, 2, 3, H, W) to (2B, 3, H, W), and repeat text_cls (B, D) for both."""
        return images.flatten(0, 1), text_cls.repeat_interleave(2, 0)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class with pairs of neighbouring images."""
        pairs = torch.stack([images, images.roll(1, 0)], dim=1)
        return super().random_inputs(images) | {"images": pairs}
