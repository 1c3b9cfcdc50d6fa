"""METER on its downstream tasks: its backbone, and the head of each.

    VQA         a head on the pooled pair: which of the answers; BCE, summed over them
    entailment  the same head, three classes; cross entropy
    NLVR2       a pass for each of two images, the second of a token type of its own; a head on both
    retrieval   how well a text fits an image: cross entropy of the true text among false ones; if
                asked for, ITM beside it, whose head stays as it was pre-trained

Source: METER (Dou et al., 2022), its official code, whose retrieval names ITM with a weight of 0.5
and takes steps by losses of at least 1 alone.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.models.meter.config import METERConfig
from elip_models.models.meter.model import (
    IMAGE,
    METER,
    METERBackbone,
    METERMatcher,
    draw_others,
)
from elip_models.models.task_output import TaskOutput
from elip_models.towers.reducible_model import random_ids
from elip_models.validation import PositiveInt, Size

PRETRAINED_HEADS = ("language_head.", "itm_head.")


@dataclass(frozen=True, kw_only=True)
class METERVQAConfig(METERConfig):
    """num_classes: answers to choose from. The other fields: see `METERConfig`."""

    image_size: Size = 576
    num_classes: Size = 3129


@dataclass(frozen=True, kw_only=True)
class METEREntailmentConfig(METERConfig):
    """num_classes: entailment, neutral, contradiction. The other fields: see `METERConfig`."""

    image_size: Size = 384
    num_classes: Size = 3


@dataclass(frozen=True, kw_only=True)
class METERNLVR2Config(METERConfig):
    """num_classes: false, true. The other fields: see `METERConfig`."""

    image_size: Size = 288
    num_classes: Size = 2


@dataclass(frozen=True, kw_only=True)
class METERRetrievalConfig(METERConfig):
    """false_texts: how many beside the true text of an image, in training. with_itm: ITM is a loss
    too. The other fields: see `METERConfig`.
    """

    image_size: Size = 384
    context_length: Size = 40
    false_texts: PositiveInt = 15
    with_itm: bool = False


@dataclass
class RankingOutput:
    """loss, and loss_rank, which is all of it, scalars. rank_logits: (B, 1+F), the true text
    first.
    """

    loss: Tensor
    loss_rank: Tensor
    rank_logits: Tensor


@dataclass
class METERRetrievalOutput(RankingOutput):
    """loss: the sum of loss_rank and loss_itm. itm_logits: (B, 2)."""

    loss_itm: Tensor
    itm_logits: Tensor


class DrawnImages(NamedTuple):
    """What a step of retrieval with ITM draws at random.

    itm_labels: (B,) int64, 1 where a text keeps its image in ITM.
    false_images: (B, 3, H, W), for each text another image, read where its label is 0.
    """

    itm_labels: Tensor
    false_images: Tensor


class METERClassifier(METERBackbone):
    """The backbone, and a classifier of its pooled texts and images."""

    task: ClassVar[str]
    pretraining = METER
    config: METERVQAConfig | METEREntailmentConfig | METERNLVR2Config

    def __init__(self, config: METERVQAConfig | METEREntailmentConfig | METERNLVR2Config) -> None:
        super().__init__(config)
        width = 2 * config.cross_width
        self.classifier = nn.Sequential(
            nn.Linear(self.images_each * width, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, config.num_classes),
        )
        self.classifier.apply(self.text_layers.init)

    @classmethod
    def from_pretraining(cls, weights: dict[str, Tensor], config: METERConfig) -> dict[str, Tensor]:
        """Pre-trained weights of METER -> those that this model begins with, by its names: all but
        the heads.
        """
        return {n: w for n, w in weights.items() if not n.startswith(PRETRAINED_HEADS)}

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also what is to be answered: the first class."""
        config, labels = self.config, torch.zeros(len(images), dtype=torch.long)
        ids = random_ids(images, config.context_length, config.vocab_size, config.sep_token_id)
        inputs = {"images": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | {"labels": labels.to(images.device)}

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Images (B, 3, H, W), input_ids and attention_mask (B, L) -> (B, num_classes)."""
        text, image = self.read_and_fuse(images, input_ids, attention_mask)
        return self.classifier(self.pool(text.tokens, image))

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> TaskOutput:
        """Compute the cross entropy of a batch: arguments as of `logits`, labels (B,) int64."""
        logits = self.logits(images, input_ids, attention_mask)
        return TaskOutput(F.cross_entropy(logits.float(), labels), logits)


class METERVQA(METERClassifier):
    """Answers a question about an image by one of the answers that are known.

    A question may have several right answers, each to a degree: each answer is a binary decision of
    its own.
    """

    family, task = "meter_vqa", "vqa"
    config_class = METERVQAConfig

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also the scores of the answers, of which the first is right."""
        inputs = super().random_inputs(images)
        labels = inputs.pop("labels")
        return inputs | {"answer_scores": F.one_hot(labels, self.config.num_classes).float()}

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, answer_scores: Tensor
    ) -> TaskOutput:
        """Compute the loss of a batch: the binary cross entropy, summed over the answers.

        Args:
            images, input_ids, attention_mask: as of `logits`.
            answer_scores: (B, num_classes) fp32 in [0, 1], how right each answer is.
        """
        logits = self.logits(images, input_ids, attention_mask)
        loss = F.binary_cross_entropy_with_logits(logits.float(), answer_scores)
        return TaskOutput(loss * logits.shape[1], logits)


class METEREntailment(METERClassifier):
    """Says whether an image entails a text: 0 entailment, 1 neutral, 2 contradiction; the official
    code numbers them 2, 1, 0.
    """

    family, task = "meter_entailment", "entailment"
    config_class = METEREntailmentConfig


class METERNLVR2(METERClassifier):
    """Says whether a statement about two images is false, 0, or true, 1."""

    family, task = "meter_nlvr2", "nlvr2"
    config_class = METERNLVR2Config
    images_each = 2

    @classmethod
    def from_pretraining(cls, weights: dict[str, Tensor], config: METERConfig) -> dict[str, Tensor]:
        """As of the other classifiers; the second image is of the type of the first."""
        weights = super().from_pretraining(weights, config)
        types = weights["token_types.weight"]
        return weights | {"token_types.weight": torch.cat([types, types[IMAGE:]])}

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Images (B, 3, H, W), each of them beside the next one."""
        inputs = super().random_inputs(images)
        return inputs | {"images": torch.stack([images, images.roll(-1, 0)], 1)}

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Images (B, 2, 3, H, W), input_ids and attention_mask (B, L) -> (B, num_classes).

        The text is read once for each image, as the official code does, and guides both.
        """
        types = IMAGE + torch.arange(2, device=images.device).repeat(len(images))
        ids, mask = (each.repeat_interleave(2, 0) for each in (input_ids, attention_mask))
        text, image = self.read_and_fuse(images.flatten(0, 1), ids, mask, types)
        return self.classifier(self.pool(text.tokens, image).unflatten(0, (-1, 2)).flatten(1))


class METERRetrieval(METERMatcher):
    """Ranks texts for an image and images for a text, by a head of one output."""

    family, task = "meter_retrieval", "retrieval"
    config_class = METERRetrievalConfig
    config: METERRetrievalConfig
    pretraining = METER

    def __init__(self, config: METERRetrievalConfig) -> None:
        super().__init__(config)
        self.itm_head.requires_grad_(False)
        self.rank_head = nn.Linear(2 * config.cross_width, 1)
        self.rank_head.apply(self.text_layers.init)

    @classmethod
    def from_pretraining(cls, weights: dict[str, Tensor], config: METERConfig) -> dict[str, Tensor]:
        """Pre-trained weights of METER -> those that this model begins with, by its names: ranks
        begin as the logit of a pair.
        """
        kept = {n: w for n, w in weights.items() if not n.startswith("language_head.")}
        itm = {part: weights[f"itm_head.{part}"] for part in ("weight", "bias")}
        return kept | {f"rank_head.{part}": rows[1:].clone() for part, rows in itm.items()}

    def rank(self, pooled: Tensor) -> Tensor:
        """Pooled text and image (B, 2C) -> (B,), how well they fit."""
        return self.rank_head(pooled)[:, 0]

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also false texts, each that of another image, and what a step draws: every second text
        keeps its image.
        """
        config, numbers = self.config, torch.arange(len(images), device=images.device)
        ids = random_ids(images, config.context_length, config.vocab_size, config.sep_token_id)
        mask, false = torch.ones_like(ids), range(1, config.false_texts + 1)
        return {
            "images": images,
            "input_ids": ids,
            "attention_mask": mask,
            "image_ids": numbers,
            "false_ids": torch.stack([ids.roll(shift, 0) for shift in false], 1),
            "false_mask": torch.stack([mask for _ in false], 1),
            "drawn": DrawnImages(1 - numbers % 2, images.roll(-1, 0)),
        }

    def rank_logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Judge T texts for each image: images (B, 3, H, W), input_ids and attention_mask
        (B, T, L) -> (B, T).

        An image is encoded once, unless texts change what is left of it, or it of them.
        """
        T = input_ids.shape[1]
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        if self.reduction.is_guided or self.text_reduction is not None:
            text, image = self.read_and_fuse(images.repeat_interleave(T, 0), ids, mask)
            return self.rank(self.pool(text.tokens, image)).unflatten(0, (-1, T))
        tokens, image_mask = self.matching_tokens(images)
        image_mask = None if image_mask is None else image_mask.repeat_interleave(T, 0)
        tokens = tokens.repeat_interleave(T, 0)
        return self.matching_logits(tokens, image_mask, ids, mask).unflatten(0, (-1, T))

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        false_ids: Tensor,
        false_mask: Tensor,
        *,
        drawn: DrawnImages | None = None,
    ) -> RankingOutput:
        """Compute the losses of a batch of pairs, with ITM a `METERRetrievalOutput`.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            image_ids: (B,) int64, equal where two pairs show the same image; read with ITM.
            false_ids, false_mask: (B, F, L), other texts for each image.
            drawn: false images of ITM instead of drawing them.
        """
        ids = torch.cat([input_ids[:, None], false_ids], 1)
        mask = torch.cat([attention_mask[:, None], false_mask], 1)
        ranks = self.rank_logits(images, ids, mask)
        loss_rank = F.cross_entropy(ranks.float(), torch.zeros_like(image_ids))
        if not self.config.with_itm:
            return RankingOutput(loss_rank, loss_rank, ranks)
        labels, false_images = self._draw(images, image_ids) if drawn is None else drawn
        is_pair = (labels == 1)[:, None, None, None]
        shown = torch.where(is_pair, images, false_images)
        text, image = self.read_and_fuse(shown, input_ids, attention_mask)
        itm_logits = self.match(text.tokens, image)
        loss_itm = F.cross_entropy(itm_logits.float(), labels)
        return METERRetrievalOutput(loss_rank + loss_itm, loss_rank, ranks, loss_itm, itm_logits)

    def _draw(self, images: Tensor, image_ids: Tensor) -> DrawnImages:
        """Half of the texts keep their image, and those whose other image is the same one."""
        labels, others = draw_others(images)
        labels = labels | (image_ids == image_ids[others]).long()
        return DrawnImages(labels, images[others])
