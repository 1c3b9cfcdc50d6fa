"""Shared part of ALBEF and BLIP: contrastive and matching losses with a queue of momentum features.

    ITC   f = normalise(W x_cls) of both towers; s = f_image f_text^T / temperature over
          [batch | queue]; cross entropy of softmax(s) with soft targets of the momentum encoders
    ITM   binary classification of pairs; negatives are drawn by the similarities of ITC

In training, all ranks store the features of all ranks, so that their queues are equal.
Source: ALBEF (Li et al., 2021), section 3.2; BLIP (Li et al., 2022).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.pretraining.models.distilled_model import DistilledModel, Encoders, MomentumConfig
from elip_models.pretraining.models.layers.bert import BertTower
from elip_models.pretraining.models.layers.distributed import all_gather, rank_of
from elip_models.pretraining.models.layers.losses import hard_negatives, soft_contrastive_loss
from elip_models.pretraining.models.layers.momentum import FeatureQueue, similarities
from elip_models.reduction.encode import run_tower


class ContrastiveOutput(NamedTuple):
    """Results of ITC that the other losses use.

    Attributes:
        loss: scalar.
        text: (B, L, D), the encoded texts.
        image: (B, K+2, D), the remaining image tokens; `image_mask` is their mask or None.
        image_m: (B, N, D), the image tokens of the momentum tower; `image_mask_m` is their mask.
        features: (B, E) of images and of texts.
        similar: image-to-text and text-to-image similarities (B, C) to the C pairs that negatives
            come from, without gradient.
    """

    loss: Tensor
    text: Tensor
    image: Tensor
    image_mask: Tensor | None
    image_m: Tensor
    image_mask_m: Tensor | None
    features: tuple[Tensor, Tensor]
    similar: tuple[Tensor, Tensor]


@dataclass
class MomentumOutput:
    """Output of a step: the sum of the losses, the losses, and features (B, E) of the batch."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    image_features: Tensor
    text_features: Tensor


class Negatives(NamedTuple):
    """Hard negatives of a step: the image of each text and the text of each image, (B,) int64.

    They are indices into the pairs, of all ranks for gather='global'.
    """

    images: Tensor
    texts: Tensor


class MomentumModel(DistilledModel):
    """Towers with momentum copies, a queue of their features, and the losses ITC and ITM.

    Attributes:
        fuses_ids: `fuse` takes the ids of a text, not its hidden states.
        stores_image_ids: the queue stores the image id of each pair.
    """

    fuses_ids: ClassVar[bool] = False
    stores_image_ids: ClassVar[bool] = False
    matching_tokens = DistilledModel.encode_masked

    def __init__(self, config: MomentumConfig, encoders: Encoders) -> None:
        super().__init__(config, encoders)
        self.itm_head = nn.Linear(config.text_width, 2)
        width, size = config.embed_dim, config.queue_size
        self.queue = FeatureQueue(width, size, with_ids=self.stores_image_ids)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))

    def updated_by_forward(self) -> tuple[Tensor, ...]:
        """Return the parameters of the momentum encoders and the buffers of the queue."""
        return *super().updated_by_forward(), *self.queue.buffers()

    @property
    def fusion_tower(self) -> BertTower:
        """The text tower, some layers of which attend to image tokens in `fuse`."""
        return self.encoders.text

    def fuse(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Fuse texts, as hidden states (B, L, D) or ids (B, L), with image tokens -> (B, L, D)."""
        raise NotImplementedError

    def encode_text_reduced(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encode the texts of a training step; a subclass may drop text tokens."""
        return self.encode_text(input_ids, mask)

    def fuse_reduced(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None
    ) -> Tensor:
        """Fuse the pairs of a training step; a subclass may drop text tokens."""
        return self.fuse(text, mask, image, image_mask)

    def image_features(self, images: Tensor) -> Tensor:
        """Return normalised features (B, E) of images (B, 3, H, W), without text."""
        tokens, _ = run_tower(self.tower, images, None, self.reduction, cls_only=True)
        return self.project_image(tokens)

    def project_image(self, tokens: Tensor) -> Tensor:
        """Return normalised features (B, E) of image tokens (B, N, D)."""
        return self.encoders.image_features(tokens)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return normalised features (B, E) of texts (B, L)."""
        return self.encoders.text_features(self.encode_text(input_ids, attention_mask))

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the next pair of the batch as the negative of each pair."""
        others = torch.arange(len(images), device=images.device).roll(-1)
        return Negatives(others, others)

    def matching_logits(
        self,
        tokens: Tensor,
        image_mask: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Return the ITM logit (B,) of each text with the image tokens of its row, in fp32."""
        text = input_ids if self.fuses_ids else self.encode_text(input_ids, attention_mask)
        fused = self.fuse(text, attention_mask, tokens, image_mask)
        return self.itm_head(fused[:, 0]).float()[:, 1]

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keep the temperature in [0.001, 0.5]."""
        self.temperature.clamp_(0.001, 0.5)

    def check_batch_size(self, batch_size: int) -> None:
        """Raise ValueError if the queue is shorter than the batch of all ranks."""
        self.queue.check(batch_size)

    def monitored(self) -> dict[str, Tensor]:
        """Return the temperature and alpha."""
        return {"temperature": self.temperature} | super().monitored()

    def contrast(
        self,
        images: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Compute ITC of a batch; in training, update the momentum encoders and the queue.

        With gradient accumulation, both are updated at each forward pass; a model that FSDP has
        sharded raises TypeError. For guide_ids and guide_mask, see `select_guidance`. image_ids
        (B,) int64 are equal where two pairs show the same image, whose texts are all positives; for
        models that set `stores_image_ids`.
        """
        online, gather = self.encoders, self.config.gather
        text = self.encode_text_reduced(images, input_ids, mask)
        if self.training:
            self._update_momentum()
        texts, scale = online.text_features(text), 1 / self.temperature
        guides = self.select_guidance(text[:, 0], texts, scale, guide_ids, guide_mask)
        (image, image_mask), (image_m, image_mask_m) = self._encode_images(images, guides)
        itc_image = image
        if self.config.guide == "after_itc" and self.reduction.is_guided:
            itc_image, _ = self.encode_image(images, torch.zeros_like(guides))
        features = online.image_features(itc_image), texts
        features_m = self._momentum_features(image_m, input_ids, mask)
        gather_m = "global" if self.training else gather
        with torch.no_grad():
            all_features_m = [all_gather(each, gather_m) for each in features_m]
            keys_m = all_features_m if gather == "global" else features_m
            keys = self.queue.contrastive_keys(*keys_m)
            similar_m = similarities(features_m, keys, self.temperature)
        similar = similarities(features, keys, self.temperature)
        first, positives = rank_of(gather) * len(images), None
        if image_ids is not None:
            positives = self.queue.positives(image_ids, all_gather(image_ids, gather))
        loss = soft_contrastive_loss(similar, similar_m, self.alpha, first, positives)
        if self.training:
            ids = None if image_ids is None else all_gather(image_ids, gather_m)
            self.queue.enqueue_(*all_features_m, ids)
        pairs = len(keys_m[0])
        of_pairs = similar[0][:, :pairs].detach(), similar[1][:, :pairs].detach()
        return ContrastiveOutput(
            loss, text, image, image_mask, image_m, image_mask_m, features, of_pairs
        )

    def draw_negatives(
        self, similar: tuple[Tensor, Tensor], image_ids: Tensor | None = None
    ) -> Negatives:
        """Draw a hard negative image for each text, and text for each image, by `similar` (B, C).

        Pairs of the same image in image_ids (B,) are no negatives.
        """
        gather, positives = self.config.gather, None
        if image_ids is not None:
            positives = image_ids[:, None] == all_gather(image_ids, gather)
        options = self.config.negative_epsilon, rank_of(gather) * len(similar[0]), positives
        return Negatives(*(hard_negatives(rows, *options) for rows in reversed(similar)))

    def matching_loss(
        self,
        text: Tensor,
        mask: Tensor,
        image: Tensor,
        negatives: tuple[Tensor, Tensor],
        *,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Return ITM of the pairs and of both kinds of negatives, in one pass of `fuse`."""

        def with_negatives(images: Tensor) -> Tensor:
            others = all_gather(images, self.config.gather)[negatives[0]]
            return torch.cat([images, others, images])

        texts, masks = (all_gather(t, self.config.gather) for t in (text, mask))
        fused = self.fuse_reduced(
            torch.cat([text, text, texts[negatives[1]]]),
            torch.cat([mask, mask, masks[negatives[1]]]),
            with_negatives(image),
            None if image_mask is None else with_negatives(image_mask),
        )
        labels = torch.zeros(len(fused), dtype=torch.long, device=mask.device)
        labels[: len(mask)] = 1
        return F.cross_entropy(self.itm_head(fused[:, 0]).float(), labels)

    @torch.no_grad()
    def _momentum_features(
        self, image: Tensor, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        momentum = self.encoders_m
        text = momentum.encode_text(input_ids, mask)
        return momentum.image_features(image), momentum.text_features(text)
