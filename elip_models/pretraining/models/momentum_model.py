"""Momentum distillation and momentum contrast, the shared part of ALBEF and BLIP.

    text    hidden states of the text alone; their CLS output guides the image tower
    image   ViT, reduced by ELIP
    copies  theta_m = m theta_m + (1 - m) theta, before each forward pass of training
    ITC     f = normalise(W x_cls) of both towers; s = f_image f_text^T / temperature over
            [batch | queue]; cross entropy of softmax(s) with soft targets of the momentum encoders
    ITM     binary classification of pairs; negatives are drawn by the similarities of ITC

The momentum image tower keeps all patches unless `momentum_reduction` reduces it. In training, all
ranks store the features of all ranks, so that their queues are equal.
Source: ALBEF (Li et al., 2021), sections 3.2 and 3.3; BLIP (Li et al., 2022).
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from elip_models.engine.encode import run_tower
from elip_models.pretraining.models.cross_modal import (
    CrossModalConfig,
    CrossModalModel,
)
from elip_models.pretraining.models.layers.bert import BertTower
from elip_models.pretraining.models.layers.distributed import all_gather, rank_of
from elip_models.pretraining.models.layers.losses import hard_negatives, soft_contrastive_loss
from elip_models.pretraining.models.layers.momentum import (
    FeatureQueue,
    similarities,
    update_momentum_,
)
from elip_models.towers import as_tower
from elip_models.towers.wrapped_modules import is_sharded
from elip_models.validation import Bounds, NonNegative, Share, Size


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(CrossModalConfig):
    """BERT beside the image tower, momentum encoders and a queue of their features.

    For the other fields, see `CrossModalConfig`.

    Attributes:
        embed_dim: width of the features.
        temperature: initial temperature of their similarities.
        queue_size: number of features in the queue.
        momentum: m of the momentum encoders.
        alpha: weight of the momentum targets, reached linearly over `alpha_warmup_epochs`.
        negative_epsilon: value that is added to each weight for drawing hard negatives.
        momentum_reduction: 'none' keeps all patches in the momentum image tower, as ELIP does.
            'shared' keeps and merges the same tokens as the trained tower, without scoring. 'own'
            reduces the momentum tower by its own scores.
    """

    text_dropout: Share = 0.1
    text_norm_eps: NonNegative = 1e-12
    embed_dim: Size = 256
    temperature: Annotated[float, Bounds(0.001)] = 0.07
    queue_size: Size = 65536
    momentum: Share = 0.995
    alpha: Share = 0.4
    alpha_warmup_epochs: NonNegative = 1.0
    negative_epsilon: Share = 0.0
    momentum_reduction: Literal["none", "shared", "own"] = "none"
    resize: Literal["crop", "squash"] = "squash"

    @property
    def bert(self) -> BertConfig:
        """Config of the text encoder."""
        eps = float(self.text_norm_eps)
        return self.bert_config("text", dropout=self.text_dropout, layer_norm_eps=eps)

    @property
    def full_alpha(self) -> float:
        """Weight of the momentum targets after its warm-up."""
        return self.alpha


class Encoders(nn.Module):
    """Parts that have a momentum copy: two towers and, with `projects`, two projections."""

    text: BertTower

    def __init__(self, config: MomentumConfig, *, projects: bool = True) -> None:
        super().__init__()
        self.visual = config.vit()
        if projects:
            self.image_projection = nn.Linear(config.vision_width, config.embed_dim)
            self.text_projection = nn.Linear(config.text_width, config.embed_dim)

    def image_features(self, tokens: Tensor) -> Tensor:
        """Return normalised features (B, E) of image tokens (B, N, D)."""
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def text_features(self, hidden: Tensor) -> Tensor:
        """Return normalised features (B, E) of hidden states (B, L, D)."""
        return F.normalize(self.text_projection(hidden[:, 0]), dim=-1)

    def encode_text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encode texts alone: input_ids and mask (B, L) -> (B, L, D)."""
        raise NotImplementedError


class DistilledModel(CrossModalModel):
    """Encoders and their momentum copies, `encoders_m`, which are None without distillation."""

    def __init__(self, config: MomentumConfig, encoders: Encoders, *, distill: bool = True) -> None:
        super().__init__(config)
        self.encoders = encoders
        self.encoders_m = copy.deepcopy(encoders).requires_grad_(False) if distill else None
        self.read_tower()
        self.tower_m = as_tower(self.encoders_m.visual) if distill else None
        self.register_buffer("alpha", torch.tensor(float(config.full_alpha)), persistent=False)

    @property
    def visual(self) -> nn.Module:
        """Image model of the online encoders."""
        return self.encoders.visual

    def updated_by_forward(self) -> tuple[Tensor, ...]:
        """Return the parameters of the momentum encoders."""
        return () if self.encoders_m is None else tuple(self.encoders_m.parameters())

    def reset_momentum_(self) -> None:
        """Copy the weights of the online encoders to the momentum encoders."""
        if self.encoders_m is not None:
            self.encoders_m.load_state_dict(self.encoders.state_dict())

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoders.encode_text(input_ids, attention_mask)

    def begin_step(self, step: int, epoch: float = math.inf) -> None:
        """Set alpha for step `step` of training, after `epoch` passes over the data."""
        super().begin_step(step, epoch)
        warmup = self.config.alpha_warmup_epochs
        self.alpha.fill_(self.config.full_alpha * min(1.0, epoch / warmup if warmup else 1.0))

    def monitored(self) -> dict[str, Tensor]:
        """Return alpha, or nothing without distillation."""
        return {} if self.encoders_m is None else {"alpha": self.alpha}

    def _update_momentum(self) -> None:
        """Update the momentum encoders; raise TypeError for a model that FSDP has sharded."""
        if any(map(is_sharded, self.modules())):
            raise TypeError(
                f"model: expected {type(self).__name__} under DistributedDataParallel in training, "
                "got one with fully_shard, which would discard the updates of the momentum "
                "encoders; use DistributedDataParallel, or CLIP or METER, which have none"
            )
        update_momentum_(self.encoders_m, self.encoders, self.config.momentum)

    def _encode_images(self, images: Tensor, text_cls: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images by the online and, without gradient, by the momentum tower."""
        image, infos = self.encode_image(images, text_cls)
        how = self.config.momentum_reduction
        strategy = self.dense if how == "none" else self.reduction
        replays = infos if how == "shared" else None
        with torch.no_grad():
            image_m, _ = run_tower(self.tower_m, images, text_cls, strategy, replays=replays)
        return image, image_m


class ContrastiveOutput(NamedTuple):
    """Results of ITC that the other losses use.

    Attributes:
        loss: scalar.
        text: (B, L, D), the encoded texts.
        image: (B, K+2, D), the remaining image tokens.
        image_m: (B, N, D), the image tokens of the momentum tower.
        features: (B, E) of images and of texts.
        similar: image-to-text and text-to-image similarities (B, C) to the C pairs that negatives
            come from, without gradient.
    """

    loss: Tensor
    text: Tensor
    image: Tensor
    image_m: Tensor
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
        output_class: class of the output of `forward`.
        fuses_ids: `fuse` takes the ids of a text, not its hidden states.
        stores_image_ids: the queue stores the image id of each pair.
    """

    output_class: ClassVar[type[MomentumOutput]] = MomentumOutput
    fuses_ids: ClassVar[bool] = False
    stores_image_ids: ClassVar[bool] = False

    def __init__(self, config: MomentumConfig, encoders: Encoders) -> None:
        super().__init__(config, encoders)
        self.itm_head = nn.Linear(config.text_width, 2)
        width, size = config.embed_dim, config.queue_size
        self.queue = FeatureQueue(width, size, with_ids=self.stores_image_ids)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))

    def updated_by_forward(self) -> tuple[Tensor, ...]:
        """Return the parameters of the momentum encoders and the buffers of the queue."""
        return *super().updated_by_forward(), *self.queue.buffers()

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Fuse texts, as hidden states (B, L, D) or ids (B, L), with image tokens -> (B, L, D)."""
        raise NotImplementedError

    def encode_text_reduced(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encode the texts of a training step; a subclass may drop text tokens."""
        return self.encode_text(input_ids, mask)

    def fuse_reduced(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Fuse the pairs of a training step; a subclass may drop text tokens."""
        return self.fuse(text, mask, image)

    def image_features(self, images: Tensor) -> Tensor:
        tokens, _ = run_tower(self.tower, images, None, self.reduction, cls_only=True)
        return self.project_image(tokens)

    def project_image(self, tokens: Tensor) -> Tensor:
        return self.encoders.image_features(tokens)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoders.text_features(self.encode_text(input_ids, attention_mask))

    def matching_logits(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the ITM logit (B,) of each text with the image tokens of its row, in fp32."""
        text = input_ids if self.fuses_ids else self.encode_text(input_ids, attention_mask)
        fused = self.fuse(text, attention_mask, tokens)
        return self.itm_head(fused[:, 0]).float()[:, 1]

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor | None = None,
        *,
        drawn: Any = None,
    ) -> MomentumOutput:
        """Return the losses of a batch of pairs; in training, update momentum encoders and queue.

        `drawn` replaces the random choices of `draw`, to repeat the step of another implementation.
        For the other arguments, see `contrast`.
        """
        text = input_ids, attention_mask
        contrast = self.contrast(images, *text, image_ids)
        if drawn is None:
            drawn = self.draw(contrast.similar, input_ids, image_ids)
        fused = input_ids if self.fuses_ids else contrast.text
        loss_itm = self.matching_loss(fused, attention_mask, contrast.image, Negatives(*drawn[:2]))
        language = self.language_losses(*text, contrast, drawn)
        loss = contrast.loss + loss_itm
        losses = contrast.loss, loss_itm, *contrast.features, *language
        return self.output_class(sum(language, start=loss), *losses)

    def language_losses(
        self, input_ids: Tensor, mask: Tensor, contrast: ContrastiveOutput, drawn: Any
    ) -> tuple[Tensor, ...]:
        """Return the losses besides ITC and ITM, the last fields of `output_class`."""
        return ()

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
        image_ids: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Compute ITC of a batch; in training, update the momentum encoders and the queue.

        With gradient accumulation, both are updated at each forward pass; a model that FSDP has
        sharded raises TypeError. image_ids (B,) int64 are equal where two pairs show the same
        image, whose texts are all positives; for models that set `stores_image_ids`.
        """
        online, gather = self.encoders, self.config.gather
        text = self.encode_text_reduced(images, input_ids, mask)
        if self.training:
            self._update_momentum()
        image, image_m = self._encode_images(images, text[:, 0])
        features = online.image_features(image), online.text_features(text)
        features_m = self._momentum_features(image_m, input_ids, mask)
        gather_m = "global" if self.training else gather
        with torch.no_grad():
            all_features_m = [all_gather(modality, gather_m) for modality in features_m]
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
        return ContrastiveOutput(loss, text, image, image_m, features, of_pairs)

    def draw(
        self,
        similar: tuple[Tensor, Tensor],
        input_ids: Tensor,
        image_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Draw a hard negative image for each text, and text for each image, by `similar` (B, C).

        Pairs of the same image in image_ids (B,) are no negatives.
        """
        gather, positives = self.config.gather, None
        if image_ids is not None:
            positives = image_ids[:, None] == all_gather(image_ids, gather)
        options = self.config.negative_epsilon, rank_of(gather) * len(similar[0]), positives
        return Negatives(*(hard_negatives(rows, *options) for rows in reversed(similar)))

    def matching_loss(
        self, text: Tensor, mask: Tensor, image: Tensor, negatives: Negatives
    ) -> Tensor:
        """Return ITM of the pairs and of both kinds of negatives, in one pass of `fuse`."""
        texts, masks, images = (all_gather(t, self.config.gather) for t in (text, mask, image))
        fused = self.fuse_reduced(
            torch.cat([text, text, texts[negatives.texts]]),
            torch.cat([mask, mask, masks[negatives.texts]]),
            torch.cat([image, images[negatives.images], image]),
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
