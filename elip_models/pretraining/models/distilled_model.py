"""Encoders with momentum copies, whose predictions are training targets (momentum distillation).

    text    hidden states of the text alone; their CLS output guides the image tower
    image   ViT, reduced by ELIP
    copies  theta_m = m theta_m + (1 - m) theta, before each forward pass of training

The momentum image tower keeps all patches unless `momentum_reduction` reduces it.
Source: ALBEF (Li et al., 2021), sections 3.2 and 3.3.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from elip_models.pretraining.models.config import ContrastiveConfig
from elip_models.pretraining.models.cross_modal import (
    CrossModalConfig,
    CrossModalModel,
    MaskedTokens,
)
from elip_models.pretraining.models.layers.bert import BertTower
from elip_models.pretraining.models.layers.momentum import update_momentum_
from elip_models.reduction.encode import run_tower
from elip_models.reduction.momentum_scores import forward_with_scores
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.scorers import ScorerName
from elip_models.reduction.strategies.elip import ELIP
from elip_models.reduction.strategy import mask_after
from elip_models.towers import as_tower
from elip_models.towers.wrapped_modules import is_sharded
from elip_models.validation import Bounds, Depth, NonNegative, PositiveInt, Share, Size, divisor_of


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(CrossModalConfig, ContrastiveConfig):
    """BERT beside the image tower, momentum encoders and a queue of their features.

    For the other fields, see `CrossModalConfig` and `ContrastiveConfig`.

    Attributes:
        scorer: also 'momentum': the momentum tower encodes all patches first, and its CLS attention
            selects the tokens of the trained tower. Outside of training losses it is 'exact'.
        guide: also 'after_itc': the caption guides the images for ITM, MLM and LM. ITC encodes them
            a second time, without text.
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

    scorer: ScorerName | Literal["momentum"] = "exact"
    guide: Literal["own", "other", "after_itc"] = "own"
    text_depth: Depth = 12
    text_heads: Annotated[PositiveInt, divisor_of("text_width")] = 12
    text_hidden: Size = 3072
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer == "momentum" and self.momentum_reduction != "none":
            raise ValueError(
                "momentum_reduction: expected 'none' with scorer='momentum', which scores all "
                f"patches, got {self.momentum_reduction!r}"
            )
        guided = self.scorer == "momentum" or self.momentum_reduction != "none"
        if self.guide == "after_itc" and guided:
            raise ValueError(
                "guide: expected 'own' or 'other' with scorer='momentum' or a momentum_reduction, "
                "since the caption would reach ITC through the momentum tower, got 'after_itc'"
            )

    def elip(self, schedule: Schedule | str) -> ELIP:
        """Return ELIP for the schedule; scorer='momentum' is replaced by 'exact' here."""
        if self.scorer == "momentum":
            return replace(self, scorer="exact").elip(schedule)
        return super().elip(schedule)

    @property
    def bert(self) -> BertConfig:
        """Config of the text encoder."""
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.text_width,
            num_hidden_layers=self.text_depth,
            num_attention_heads=self.text_heads,
            intermediate_size=self.text_hidden,
            hidden_dropout_prob=float(self.text_dropout),
            attention_probs_dropout_prob=float(self.text_dropout),
            max_position_embeddings=self.max_positions,
            layer_norm_eps=float(self.text_norm_eps),
            initializer_range=float(self.initializer_range),
            pad_token_id=self.pad_token_id,
        )

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
        if not projects:
            return
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

    config: MomentumConfig
    encoders: Encoders
    encoders_m: Encoders | None
    alpha: Tensor

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
        """Encode texts alone: input_ids and attention_mask (B, L) -> (B, L, D)."""
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

    def _encode_images(self, images: Tensor, text_cls: Tensor) -> tuple[MaskedTokens, MaskedTokens]:
        how = self.config.momentum_reduction
        if self.config.scorer == "momentum" and type(self.reduction) is ELIP:
            image_m, rows = forward_with_scores(
                self.tower_m, images, text_cls.detach(), self.reduction
            )
            image, infos = self.encode_image(images, text_cls, rows)
            return (image, mask_after(infos)), (image_m, None)
        image, infos = self.encode_image(images, text_cls)
        strategy = self.dense if how == "none" else self.reduction
        replays = infos if how == "shared" else None
        with torch.no_grad():
            image_m, infos_m = run_tower(self.tower_m, images, text_cls, strategy, replays=replays)
        return (image, mask_after(infos)), (image_m, mask_after(infos_m))
