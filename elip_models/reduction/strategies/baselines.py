"""What ELIP is compared with on its own schedule: TRIPS, a random choice, and patch dropout."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from elip_models.reduction.schedule import PAPER, Schedule, Stage
from elip_models.reduction.scorers import ScorerName
from elip_models.reduction.strategies.elip import ELIP, Staged
from elip_models.reduction.strategy import (
    Context,
    Layer,
    Merge,
    StageInfo,
    Strategy,
    least_share,
)
from elip_models.towers import Tower, TowerSize
from elip_models.validation import Count, PositiveShare, Share, check_fields


@dataclass(frozen=True)
class TRIPS(ELIP):
    """Text alone selects, by the first layer of each stage (TRIPS, Jiang et al., EMNLP 2022).

    The query is the text's vector through that layer's own norm and projection; merging and
    schedule are ELIP's, so that the scorer is all that differs.
    """

    name: ClassVar[str] = "trips"

    scorer: ScorerName = 1
    fusion: Share = 0.0


class RandomKeep(Staged):
    """A schedule whose patches are drawn at random."""

    @torch.no_grad()
    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        """A row (B, N): 2 for `stage.keep` patches, 1 for the others, which so merge evenly."""
        B, N, _ = tokens.shape
        p = tower.num_prefix_tokens
        drawn = torch.rand(B, N - p, device=tokens.device).topk(stage.keep, dim=1).indices
        return torch.ones(B, N, device=tokens.device).scatter(1, drawn + p, 2.0)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        if context.replay is not None:  # its forward drew here: dropout that follows must agree
            self.score(tower, stage, tokens, None)
        return super().step(tower, stage, tokens, context)


@dataclass(frozen=True)
class RandomPruning(RandomKeep):
    """ELIP's schedule with patches kept at random and the others averaged: the control.

    schedule, merge, proportional: as of `ELIP`.
    """

    name: ClassVar[str] = "random"

    schedule: Schedule = PAPER
    merge: Merge = "one"
    proportional: bool = False


@dataclass(frozen=True)
class PatchDropout(RandomKeep):
    """Drop patches at random before block 0, in training alone (FLIP, Li et al., CVPR 2023).

    keep_ratio: share of the patches that stay, in (0, 1].
    until: the first step of training that sees all patches again, or None: all steps drop.
        `at(step)` is what to reduce by in that step.
    """

    name: ClassVar[str] = "patch_dropout"
    keep_field: ClassVar[str | None] = "keep_ratio"

    keep_ratio: PositiveShare = 0.5
    until: Count | None = None
    merge: ClassVar[Merge] = "none"

    def __post_init__(self) -> None:
        check_fields(self)

    def at(self, step: int) -> "PatchDropout":
        """What step `step` of training is reduced by: nothing from step `until` on.

        `reduce_(model, strategy=dropout.at(step))` in every step changes the model only once.
        """
        over = self.until is not None and step >= self.until
        return replace(self, keep_ratio=1.0, until=None) if over else replace(self, until=None)

    def fitted(self, tower: Tower) -> Self:
        return Strategy.fitted(self, tower)

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        keep = max(1, int(self.keep_ratio * size.num_patches))
        return () if keep == size.num_patches else (Stage(0, size.depth, keep),)

    def token_counts(self, size: TowerSize) -> tuple[Layer, ...]:
        tokens = size.num_prefix_tokens + max(1, int(self.keep_ratio * size.num_patches))
        return (Layer(tokens, tokens),) * size.depth

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        return training

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        return replace(self, keep_ratio=1 - strength * (1 - least_share(size)))
