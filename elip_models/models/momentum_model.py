"""What ALBEF and BLIP share: momentum towers, a queue of their features, the ITC and ITM losses.

    text    hidden states of the text alone; their CLS output guides the image tower
    image   ViT reduced by ELIP; features f = normalise(W x_cls) of both towers
    ITC     soft targets of the momentum towers, over the batch and the queue
    ITM     hard negatives by the similarities of ITC

The momentum towers follow before each step's momentum features, and see all patches unless
`momentum_reduction` says otherwise. In training all ranks enqueue all features, so that the queue
is the same everywhere.
Source: ALBEF (Li et al., 2021), section 3.2; BLIP (Li et al., 2022).
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from elip_models.models.config import ContrastiveConfig
from elip_models.models.cross_modal import CrossModalConfig, CrossModalModel
from elip_models.models.layers.bert import BertTower
from elip_models.models.layers.distributed import all_gather, rank_of
from elip_models.models.layers.losses import hard_negatives, soft_contrastive_loss
from elip_models.models.layers.momentum import (
    FeatureQueue,
    momentum_copy,
    similarities,
    update_momentum_,
)
from elip_models.reduction.encode import run_tower
from elip_models.reduction.read_rows import run_and_read
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.scorers import ScorerName
from elip_models.reduction.strategies.elip import Elip
from elip_models.reduction.strategy import mask_after
from elip_models.towers import as_tower
from elip_models.towers.fsdp import is_sharded
from elip_models.validation import Bounds, NonNegative, PositiveInt, Share, divisor_of


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(CrossModalConfig, ContrastiveConfig):
    """BERT beside the image tower, momentum encoders and a queue of their features.

    embed_dim: of the features. temperature: of their similarities, at the start.
    queue_size: features in the queue. momentum: of the momentum encoders.
    alpha: weight of the momentum targets, reached linearly over `alpha_warmup_epochs`.
    negative_epsilon: added to each weight that hard negatives are drawn by.
    momentum_reduction: 'none' shows the momentum image tower all patches, as ELIP does; 'shared'
        the tokens that the online one kept and merged, by the same weights: no scoring; 'own' lets
        it choose for itself, by the same text if any, as EViT and ToMe do in a copy of the tower
        that they changed.
    scorer: also 'momentum': the momentum image tower, which sees all patches anyway, runs first,
        and its rows select (`read_rows.py`); where it does not run, outside of the loss, 'exact'.
    guide: also 'after_itc': the caption guides the images that ITM, MLM and LM see, and ITC sees
        them once more, reduced by themselves alone: a second pass of the image tower.
    The other fields: see `CrossModalConfig` and `ContrastiveConfig`.
    """

    scorer: ScorerName | Literal["momentum"] = "exact"
    guide: Literal["own", "other", "after_itc"] = "own"
    text_depth: PositiveInt = 12
    text_heads: Annotated[PositiveInt, divisor_of("text_width")] = 12
    text_hidden: PositiveInt = 3072
    text_dropout: Share = 0.1
    text_norm_eps: NonNegative = 1e-12
    embed_dim: PositiveInt = 256
    temperature: Annotated[float, Bounds(0.001)] = 0.07
    queue_size: PositiveInt = 65536
    momentum: Share = 0.995
    alpha: Share = 0.4
    alpha_warmup_epochs: NonNegative = 1.0
    negative_epsilon: Share = 0.0
    momentum_reduction: Literal["none", "shared", "own"] = "none"
    resize: Literal["crop", "squash"] = "squash"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer == "momentum" and self.momentum_reduction != "none":
            raise ValueError(
                "momentum_reduction: expected 'none' with scorer='momentum', whose rows are those "
                f"of all patches, got {self.momentum_reduction!r}"
            )
        guided = self.scorer == "momentum" or self.momentum_reduction != "none"
        if self.guide == "after_itc" and guided:
            raise ValueError(
                "guide: expected 'own' or 'other' with scorer='momentum' or a momentum_reduction, "
                "by which the caption would reach ITC through the momentum tower, got 'after_itc'"
            )

    def elip(self, schedule: Schedule | str) -> Elip:
        by_momentum = self.scorer == "momentum"
        return (replace(self, scorer="exact") if by_momentum else super()).elip(schedule)

    @property
    def bert(self) -> BertConfig:
        """The config of the text encoder."""
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.text_width,
            num_hidden_layers=self.text_depth,
            num_attention_heads=self.text_heads,
            intermediate_size=self.text_hidden,
            hidden_dropout_prob=self.text_dropout,
            attention_probs_dropout_prob=self.text_dropout,
            max_position_embeddings=self.max_positions,
            layer_norm_eps=self.text_norm_eps,
            initializer_range=self.initializer_range,
            pad_token_id=self.pad_token_id,
        )


class Encoders(nn.Module):
    """The parts that have a momentum copy: both towers and, where `projected`, a projection
    each."""

    text: BertTower

    def __init__(self, config: MomentumConfig, *, projected: bool = True) -> None:
        super().__init__()
        self.visual = config.vit()
        if not projected:
            return
        self.image_projection = nn.Linear(config.vision_width, config.embed_dim)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim)

    def image_features(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> (B, E), normalised."""
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def text_features(self, hidden: Tensor) -> Tensor:
        """hidden (B, L, D) -> (B, E), normalised."""
        return F.normalize(self.text_projection(hidden[:, 0]), dim=-1)

    def read(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids, mask (B, L) -> (B, L, D): the text alone."""
        raise NotImplementedError


Masked = tuple[Tensor, Tensor | None]
"""Image tokens (B, N, D), and which of them are real (B, N), None where all are."""


class Contrast(NamedTuple):
    """What ITC computes that the other objectives use.

    loss: scalar. text: (B, L, D). image, image_m: (B, K+2, D), (B, N, D) of the momentum tower;
    image_mask, image_mask_m: which of them are real, None where all are. features: (B, E) of image
    and text. similar: image-to-text and text-to-image (B, C) of the C pairs that negatives come
    from, without gradient.
    """

    loss: Tensor
    text: Tensor
    image: Tensor
    image_mask: Tensor | None
    image_m: Tensor
    image_mask_m: Tensor | None
    features: tuple[Tensor, Tensor]
    similar: tuple[Tensor, Tensor]


class MomentumModel(CrossModalModel):
    """Towers with momentum copies, the queue of their features, contrastive and matching losses."""

    config: MomentumConfig
    encoders: Encoders
    alpha: Tensor

    def __init__(self, config: MomentumConfig, encoders: Encoders) -> None:
        super().__init__(config)
        self.encoders = encoders
        self.encoders_m = momentum_copy(encoders)
        self.read_tower()
        self.tower_m = as_tower(self.encoders_m.visual)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.queue = FeatureQueue(config.embed_dim, config.queue_size)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))
        self.register_buffer("alpha", torch.tensor(float(config.alpha)), persistent=False)

    @property
    def visual(self) -> nn.Module:
        """The image model."""
        return self.encoders.visual

    def moved_in_training(self) -> tuple[Tensor, ...]:
        """The momentum encoders and the queue."""
        return *self.encoders_m.parameters(), *self.queue.buffers()

    def reset_momentum_(self) -> None:
        """Make the momentum encoders equal to the online ones."""
        self.encoders_m.load_state_dict(self.encoders.state_dict())

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> hidden states (B, L, D) of the text alone."""
        return self.encoders.read(input_ids, attention_mask)

    def fuse(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """text (B, ..), mask (B, L), image (B, N, D) and image_mask (B, N), None where all are real
        -> (B, L, D): the text that saw the image."""
        raise NotImplementedError

    def read_pairs(self, images: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The texts of a step, as `encode_text` reads them, unless they lose tokens in it."""
        return self.encode_text(input_ids, mask)

    def fuse_pairs(
        self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None
    ) -> Tensor:
        """The pairs of a step, as `fuse` does, unless their texts lose tokens in it."""
        return self.fuse(text, mask, image, image_mask)

    def image_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), without text -> (B, E), normalised."""
        tokens, _ = run_tower(self.tower, images, None, self.reduction, cls_only=True)
        return self.project_image(tokens)

    def project_image(self, tokens: Tensor) -> Tensor:
        return self.encoders.image_features(tokens)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> (B, E), normalised."""
        return self.encoders.text_features(self.encode_text(input_ids, attention_mask))

    def begin_step(self, step: int, epoch: float = math.inf) -> None:
        """Warm alpha up too, before step `step` of training, after `epoch` passes over the data."""
        super().begin_step(step, epoch)
        warmup = self.config.alpha_warmup_epochs
        self.alpha.fill_(self.config.alpha * min(1.0, epoch / warmup if warmup else 1.0))

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keep the temperature in [0.001, 0.5]."""
        self.temperature.clamp_(0.001, 0.5)

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError where the queue holds less than the batch of all ranks."""
        self.queue.check(batch_size)

    def monitored(self) -> dict[str, Tensor]:
        """The temperature, and alpha."""
        return {"temperature": self.temperature, "alpha": self.alpha}

    def contrast(
        self,
        images: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
    ) -> Contrast:
        """Contrast images (B, 3, H, W) and texts (B, L), ITC; in training, momentum and queue move
        on. guide_ids and guide_mask as of `guides`.

        With gradient accumulation they move at each forward pass.

        Raises:
            TypeError: in training, a model that FSDP has sharded.
        """
        online, gather = self.encoders, self.config.gather
        text = self.read_pairs(images, input_ids, mask)
        if self.training:
            self._follow()
        texts, scale = online.text_features(text), 1 / self.temperature
        guides = self.guides(text[:, 0], texts, scale, guide_ids, guide_mask)
        (image, image_mask), (image_m, image_mask_m) = self._images(images, guides)
        seen = image
        if self.config.guide == "after_itc" and self.reduction.is_guided:
            seen, _ = self.encode_image(images, torch.zeros_like(guides))
        features = online.image_features(seen), texts
        features_m = self._momentum_features(image_m, input_ids, mask)
        reach = "global" if self.training else gather
        with torch.no_grad():
            everywhere = all_gather(features_m[0], reach), all_gather(features_m[1], reach)
            contrasted = everywhere if gather == "global" else features_m
            keys = self.queue.behind(*contrasted)
            similar_m = similarities(features_m, keys, self.temperature)
        similar = similarities(features, keys, self.temperature)
        first = rank_of(gather) * len(images)
        loss = soft_contrastive_loss(similar, similar_m, self.alpha, first)
        if self.training:
            self.queue.enqueue_(*everywhere)
        pairs = len(contrasted[0])
        of_pairs = similar[0][:, :pairs].detach(), similar[1][:, :pairs].detach()
        return Contrast(loss, text, image, image_mask, image_m, image_mask_m, features, of_pairs)

    def _follow(self) -> None:
        """Move the momentum encoders on; raises TypeError where they would follow what FSDP throws
        away."""
        if any(map(is_sharded, self.modules())):
            raise TypeError(
                f"model: expected {type(self).__name__} under DistributedDataParallel in training, "
                "got one that fully_shard was applied to, whose gathered parameters a step of the "
                "momentum encoders would not outlive; CLIP and METER have none and can be sharded"
            )
        update_momentum_(self.encoders_m, self.encoders, self.config.momentum)

    def draw_negatives(self, similar: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Draw hard negatives by the similarities (B, C): an image for each text, a text for each
        image.

        Returns:
            (B,) int64 each; they number the pairs of all ranks where gather='global'.
        """
        image_to_text, text_to_image = similar
        first = rank_of(self.config.gather) * len(image_to_text)
        epsilon = self.config.negative_epsilon
        negative_images = hard_negatives(text_to_image, epsilon, first)
        return negative_images, hard_negatives(image_to_text, epsilon, first)

    def matching_loss(
        self,
        text: Tensor,
        mask: Tensor,
        image: Tensor,
        negatives: tuple[Tensor, Tensor],
        *,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute ITM of the pairs and both kinds of negatives, in one pass of `fuse`.

        Args:
            text, mask, image, image_mask: (B, ..) as `fuse` takes them.
            negatives: see `draw_negatives`.
        """

        def with_negatives(images: Tensor) -> Tensor:
            others = all_gather(images, self.config.gather)[negatives[0]]
            return torch.cat([images, others, images])

        texts, masks = (all_gather(t, self.config.gather) for t in (text, mask))
        fused = self.fuse_pairs(
            torch.cat([text, text, texts[negatives[1]]]),
            torch.cat([mask, mask, masks[negatives[1]]]),
            with_negatives(image),
            None if image_mask is None else with_negatives(image_mask),
        )
        labels = torch.zeros(len(fused), dtype=torch.long, device=mask.device)
        labels[: len(mask)] = 1
        return F.cross_entropy(self.itm_head(fused[:, 0]).float(), labels)

    def _images(self, images: Tensor, text_cls: Tensor) -> tuple[Masked, Masked]:
        """Encode images (B, 3, H, W), guided by text_cls (B, D) -> tokens of the online tower, and
        of the momentum tower, without gradient: of all patches, or of those that are left."""
        how = self.config.momentum_reduction
        if self.config.scorer == "momentum" and type(self.reduction) is Elip:
            image_m, rows = run_and_read(self.tower_m, images, text_cls.detach(), self.reduction)
            image, infos = self.encode_image(images, text_cls, rows)
            return (image, mask_after(infos)), (image_m, None)
        image, infos = self.encode_image(images, text_cls)
        strategy, replays = self.dense if how == "none" else self.reduction, None
        if how == "shared":
            replays = infos
        with torch.no_grad():
            image_m, infos_m = run_tower(self.tower_m, images, text_cls, strategy, replays=replays)
        return (image, mask_after(infos)), (image_m, mask_after(infos_m))

    @torch.no_grad()
    def _momentum_features(
        self, image: Tensor, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of image and text by the momentum encoders, from their tokens of the image."""
        momentum = self.encoders_m
        text = momentum.read(input_ids, mask)
        return momentum.image_features(image), momentum.text_features(text)
