"""METER fine-tuned for VQA, visual entailment, NLVR2 and image-text retrieval.

    VQA         a classifier over the pooled pair; binary cross entropy, summed over the answers
    entailment  the same classifier with three classes; cross entropy
    NLVR2       one pass for each of two images, with different token types; a classifier over both
    retrieval   a score for each pair; cross entropy of the true text among false texts

Source: METER (Dou et al., 2022) and its official code. For retrieval, that code lists ITM with a
weight of 0.5, but it uses only losses whose weight is at least 1: the head of ITM is frozen.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.pretraining.models.downstream import Classifier, TaskOutput, Weights, renamed
from elip_models.pretraining.models.meter.config import METERConfig
from elip_models.pretraining.models.meter.model import IMAGE, METER, METERBackbone, METERMatcher
from elip_models.validation import PositiveInt, Size

PRETRAINED_HEADS = ("language_head.", "itm_head.")


@dataclass(frozen=True, kw_only=True)
class METERVQAConfig(METERConfig):
    """Hyper-parameters of METER for VQA, with the number of answers; see `METERConfig`."""

    image_size: Size = 576
    num_classes: Size = 3129


@dataclass(frozen=True, kw_only=True)
class METEREntailmentConfig(METERConfig):
    """Hyper-parameters of METER for entailment, neutral and contradiction; see `METERConfig`."""

    image_size: Size = 384
    num_classes: Size = 3


@dataclass(frozen=True, kw_only=True)
class METERNLVR2Config(METERConfig):
    """Hyper-parameters of METER for NLVR2, false or true; see `METERConfig`."""

    image_size: Size = 288
    num_classes: Size = 2


@dataclass(frozen=True, kw_only=True)
class METERRetrievalConfig(METERConfig):
    """Hyper-parameters of METER for retrieval; for the other fields, see `METERConfig`.

    Attributes:
        false_texts: number of false texts for each image in training.
    """

    image_size: Size = 384
    context_length: Size = 40
    false_texts: PositiveInt = 15


class METERClassifier(Classifier, METERBackbone):
    """Backbone with a classifier of the pooled pair."""

    task: ClassVar[str]
    pretraining = METER

    def __init__(self, config: METERConfig) -> None:
        super().__init__(config)
        width = 2 * config.cross_width
        self.classifier = nn.Sequential(
            nn.Linear(self.images_per_text * width, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, config.num_classes),
        )
        self.classifier.apply(self.text_layers.init)

    @classmethod
    def from_pretraining(cls, weights: Weights, config: METERConfig) -> Weights:
        """Select the weights of a pre-trained METER except for its heads."""
        return {n: w for n, w in weights.items() if not n.startswith(PRETRAINED_HEADS)}

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        text, image = self.encode_and_fuse(images, input_ids, attention_mask)
        return self.classifier(self.pool(text.tokens, image))


class METERVQA(METERClassifier):
    """METER that classifies a question about an image into a fixed list of answers.

    A question can have several correct answers, with scores. Each answer is a binary decision.
    """

    family, task = "meter_vqa", "vqa"
    config_class = METERVQAConfig

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class, and scores of the answers."""
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        scores = F.one_hot(labels, self.config.num_classes).float()
        return super().random_inputs(images) | {"answer_scores": scores}

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, answer_scores: Tensor
    ) -> TaskOutput:
        """Return the binary cross entropy of a batch, summed over the answers.

        answer_scores (B, num_classes), fp32 in [0, 1], are degrees of correctness.
        """
        logits = self.logits(images, input_ids, attention_mask)
        loss = F.binary_cross_entropy_with_logits(logits.float(), answer_scores)
        return TaskOutput(loss * logits.shape[1], logits)


class METEREntailment(METERClassifier):
    """METER that classifies a text: 0 entailment, 1 neutral, 2 contradiction.

    The official code numbers these classes 2, 1, 0.
    """

    family, task = "meter_entailment", "entailment"
    config_class = METEREntailmentConfig


class METERNLVR2(METERClassifier):
    """METER that classifies a statement about two images as false (0) or true (1)."""

    family, task = "meter_nlvr2", "nlvr2"
    config_class = METERNLVR2Config
    images_per_text = 2

    @classmethod
    def from_pretraining(cls, weights: Weights, config: METERConfig) -> Weights:
        """Select the weights without the heads; both images start with the same token type."""
        weights = super().from_pretraining(weights, config)
        types = weights["token_types.weight"]
        return weights | {"token_types.weight": torch.cat([types, types[IMAGE:]])}

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 2, 3, H, W) and texts (B, L).

        The text is encoded once for each image, as in the official code, and guides both.
        """
        types = IMAGE + torch.arange(2, device=images.device).repeat(len(images))
        ids, mask = (part.repeat_interleave(2, 0) for part in (input_ids, attention_mask))
        text, image = self.encode_and_fuse(images.flatten(0, 1), ids, mask, types)
        return self.classifier(self.pool(text.tokens, image).unflatten(0, (-1, 2)).flatten(1))


class METERRetrieval(METERMatcher):
    """METER that scores pairs of texts and images by a head of one output."""

    family, task = "meter_retrieval", "retrieval"
    config_class = METERRetrievalConfig
    pretraining = METER

    def __init__(self, config: METERRetrievalConfig) -> None:
        super().__init__(config)
        self.itm_head.requires_grad_(False)
        self.rank_head = nn.Linear(2 * config.cross_width, 1)
        self.rank_head.apply(self.text_layers.init)

    @classmethod
    def from_pretraining(cls, weights: Weights, config: METERConfig) -> Weights:
        """Select the weights of a pre-trained METER; the new head gets the pair logit of ITM."""
        heads = renamed(weights, [("itm_head.", "rank_head.")])
        kept = {n: w for n, w in weights.items() if not n.startswith("language_head.")}
        return kept | {name: rows[1:].clone() for name, rows in heads.items()}

    def rank(self, pooled: Tensor) -> Tensor:
        return self.rank_head(pooled)[:, 0]

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the inputs of the base class, and texts of other images as false texts."""
        inputs, count = super().random_inputs(images), self.config.false_texts
        false = [inputs["input_ids"].roll(i, 0) for i in range(1, count + 1)]
        mask = inputs["attention_mask"][:, None].expand(-1, count, -1)
        return inputs | {"false_ids": torch.stack(false, 1), "false_mask": mask}

    def rank_logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return scores (B, T) of T texts, ids and mask (B, T, L), for each of B images.

        An image is encoded once for all texts, unless the texts and the image reduce one another.
        """
        T = input_ids.shape[1]
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        if self.reduction.is_guided or self.text_reduction is not None:
            text, image = self.encode_and_fuse(images.repeat_interleave(T, 0), ids, mask)
            return self.rank(self.pool(text.tokens, image)).unflatten(0, (-1, T))
        tokens = self.encode_image(images)[0].repeat_interleave(T, 0)
        return self.matching_logits(tokens, ids, mask).unflatten(0, (-1, T))

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        false_ids: Tensor,
        false_mask: Tensor,
    ) -> TaskOutput:
        """Return the loss of a batch, and scores (B, 1+F) of its texts, the true one first.

        false_ids and false_mask (B, F, L) are other texts for each image. image_ids (B,) int64 are
        the numbers of the images, which retrieval passes to all models.
        """
        ids = torch.cat([input_ids[:, None], false_ids], 1)
        mask = torch.cat([attention_mask[:, None], false_mask], 1)
        ranks = self.rank_logits(images, ids, mask)
        return TaskOutput(F.cross_entropy(ranks.float(), torch.zeros_like(image_ids)), ranks)
