"""ALBEF with a text-guided, token-reduced image tower.

    text    BERT's first layers on the text alone; their CLS output guides the image tower
    image   ViT reduced by ELIP; features f = normalise(W x_cls) of both towers
    fusion  BERT's other layers, text attending to the image tokens
    loss    ITC (soft targets, queue) + ITM (hard negatives) + MLM (momentum distillation)

The momentum towers follow before each step's momentum features, and see all patches.
Source: ALBEF (Li et al., 2021); ELIP, section 3 and its official ALBEF code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.cross_modal import DistilledConfig
from elip_models.modules.bert import BertTower, masked_language_head
from elip_models.modules.momentum import FeatureQueue, momentum_copy, update_momentum_
from elip_models.modules.objectives import (
    distilled_language_loss,
    hard_negatives,
    mask_tokens,
    soft_contrastive_loss,
)
from elip_models.reduction.encode import run_tower
from elip_models.reduction.stage import Elip
from elip_models.reduction.strategy import StageInfo
from elip_models.towers import as_tower


@dataclass(frozen=True)
class ALBEFConfig(DistilledConfig):
    """Hyper-parameters of an ALBEF model; the defaults are the paper's.

    text_layers: of `text_depth` layers, those that read the text alone; the others fuse.
    The other fields: see `DistilledConfig`; alpha weighs the momentum targets of ITC and MLM.
    """

    image_size: int = 256
    text_layers: int = 6
    cls_token_id: int = 101
    sep_token_id: int = 102
    mask_token_id: int = 103
    mask_probability: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.text_layers < self.text_depth:
            raise ValueError(
                f"text_layers: expected 1 to {self.text_depth - 1} of {self.text_depth} layers, "
                f"got {self.text_layers}"
            )
        self.check_shares("mask_probability")


@dataclass
class ALBEFOutput:
    """loss: the sum of the three others, scalars. image_features, text_features: (B, E)."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_mlm: Tensor
    image_features: Tensor
    text_features: Tensor


class Drawn(NamedTuple):
    """What `forward` draws at random, for a caller that has drawn it.

    negative_images: (B,) for each text. negative_texts: (B,) for each image.
    masked_ids, labels: (B, L), see `mask_tokens`.
    """

    negative_images: Tensor
    negative_texts: Tensor
    masked_ids: Tensor
    labels: Tensor


class Encoders(nn.Module):
    """The parts that have a momentum copy: both towers, a projection each, the language head."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__()
        self.visual = config.vit()
        fusing = range(config.text_layers, config.text_depth)
        self.text = BertTower(config.bert, cross_attention=fusing)
        self.language_head = masked_language_head(self.text)
        self.image_projection = nn.Linear(config.vision_width, config.embed_dim)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim)
        self.reads, self.fuses = range(config.text_layers), fusing

    def image_features(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> (B, E), normalised."""
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def text_features(self, hidden: Tensor) -> Tensor:
        """hidden (B, L, D) -> (B, E), normalised."""
        return F.normalize(self.text_projection(hidden[:, 0]), dim=-1)

    def read(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids, mask (B, L) -> (B, L, D): the text alone."""
        return self.text.run(self.text.embed(input_ids), mask, self.reads)

    def fuse(self, hidden: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """hidden (B, L, D) attends to image_tokens (B, N, D) -> (B, L, D)."""
        return self.text.run(hidden, mask, self.fuses, image_tokens)

    def predict(self, input_ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Logits (B, L, V) of the tokens, with the image before the text's eyes."""
        hidden = self.fuse(self.read(input_ids, mask), mask, image_tokens)
        return self.language_head(hidden)


class ALBEF(nn.Module):
    """Image and text towers, fusion layers, their momentum copies and the feature queue."""

    def __init__(self, config: ALBEFConfig) -> None:
        super().__init__()
        self.config = config
        self.reduction = config.reduction
        self.dense = Elip(f"{config.vision_depth}(100%)", without_text="vision")
        self.encoders = Encoders(config)
        self.encoders_m = momentum_copy(self.encoders)
        self.tower = as_tower(self.encoders.visual)
        self.tower_m = as_tower(self.encoders_m.visual)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.queue = FeatureQueue(config.embed_dim, config.queue_size)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))
        self.alpha = config.alpha

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> hidden states (B, L, D) of the text alone."""
        return self.encoders.read(input_ids, attention_mask)

    def encode_image(
        self, images: Tensor, text_cls: Tensor | None = None
    ) -> tuple[Tensor, list[StageInfo]]:
        """images (B, 3, H, W), guided by text_cls (B, D) -> tokens (B, K+2, D), infos of stages."""
        return run_tower(self.tower, images, text_cls, self.reduction)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        drawn: Drawn | None = None,
    ) -> ALBEFOutput:
        """The pre-training losses of a batch of pairs; in training momentum and queue move on.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), 1 = real.
            drawn: negatives and masked tokens instead of drawing them, so that a run can be
                repeated by another implementation.
        """
        online, mask = self.encoders, attention_mask
        if self.training:
            self._clamp_temperature()
        text = online.read(input_ids, mask)
        image, infos = self.encode_image(images, text[:, 0])
        shared = infos if self.config.momentum_reduction == "shared" else None
        image_features, text_features = online.image_features(image), online.text_features(text)
        if self.training:
            update_momentum_(self.encoders_m, online, self.config.momentum)
        image_m, features_m = self._momentum_features(images, input_ids, mask, shared)
        similar, similar_m = self.queue.similarities(
            (image_features, text_features), features_m, self.temperature
        )
        loss_itc = soft_contrastive_loss(similar, similar_m, self.alpha)
        if self.training:
            self.queue.enqueue_(*features_m)
        if drawn is None:
            drawn = self._draw(similar, input_ids)
        loss_itm = self._matching_loss(image, text, mask, drawn)
        logits = online.predict(drawn.masked_ids, mask, image)
        with torch.no_grad():
            teacher = self.encoders_m.predict(drawn.masked_ids, mask, image_m)
        loss_mlm = distilled_language_loss(logits, drawn.labels, teacher, self.alpha)
        loss = loss_itc + loss_itm + loss_mlm
        return ALBEFOutput(loss, loss_itc, loss_itm, loss_mlm, image_features, text_features)

    @torch.no_grad()
    def _clamp_temperature(self) -> None:
        self.temperature.clamp_(0.001, 0.5)

    @torch.no_grad()
    def _momentum_features(
        self, images: Tensor, input_ids: Tensor, mask: Tensor, infos: list[StageInfo] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens (B, N, D) of all patches, and the features (B, E) of image and text."""
        momentum = self.encoders_m
        settings = self.dense if infos is None else self.reduction
        image, _ = run_tower(self.tower_m, images, None, settings, replays=infos)
        text = momentum.read(input_ids, mask)
        return image, (momentum.image_features(image), momentum.text_features(text))

    def _draw(self, similar: tuple[Tensor, Tensor], input_ids: Tensor) -> Drawn:
        """Hard negatives by the similarities, and masked tokens."""
        config, B = self.config, input_ids.shape[0]
        image_to_text, text_to_image = (s[:, :B].detach() for s in similar)
        masked = mask_tokens(
            input_ids,
            mask_token_id=config.mask_token_id,
            special_token_ids=(config.pad_token_id, config.cls_token_id, config.sep_token_id),
            vocab_size=config.vocab_size,
            probability=config.mask_probability,
        )
        return Drawn(hard_negatives(text_to_image), hard_negatives(image_to_text), *masked)

    def _matching_loss(self, image: Tensor, text: Tensor, mask: Tensor, drawn: Drawn) -> Tensor:
        """ITM of the pairs and both kinds of negatives, in one pass of the fusion layers."""
        B = len(text)
        texts = torch.cat([text, text, text[drawn.negative_texts]])
        masks = torch.cat([mask, mask, mask[drawn.negative_texts]])
        images = torch.cat([image, image[drawn.negative_images], image])
        fused = self.encoders.fuse(texts, masks, images)
        labels = torch.zeros(3 * B, dtype=torch.long, device=text.device)
        labels[:B] = 1
        return F.cross_entropy(self.itm_head(fused[:, 0]).float(), labels)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        self.encoders.visual.set_grad_checkpointing(enable)
        self.encoders.text.set_grad_checkpointing(enable)
