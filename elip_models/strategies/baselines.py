"""Baselines on ELIP's schedule: TRIPS, random pruning and patch dropout."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from elip_models.strategies.elip import ELIP, Staged
from elip_models.strategies.flops import TokenCounts
from elip_models.strategies.schedule import Schedule, Stage
from elip_models.strategies.scorers import ScorerName
from elip_models.strategies.shares import floor_of
from elip_models.strategies.strategy import Context, StageInfo, Strategy, least_share
from elip_models.towers import Tower, TowerSize
from elip_models.towers.merge import Merge
from elip_models.validation import Count, PositiveShare, Share, check_fields


@dataclass(frozen=True)
class TRIPS(ELIP):
    """Select by the text alone, in the first layer of each stage (TRIPS, Jiang et al., EMNLP 2022).

    The query is the text's vector, passed through that layer's own norm and projection. Merging and
    schedule are ELIP's, so that only the scorer differs.
    """

    name: ClassVar[str] = "trips"
    summary: ClassVar[str] = "as `elip`, but the text alone selects"

    scorer: ScorerName = 1
    fusion: Share = 0.0


class RandomKeep(Staged):
    """A schedule whose kept patches are drawn at random."""

    @torch.no_grad()
    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        """Return a row (B, N): 2 for `stage.keep` patches, 1 for the others, which merge evenly."""
        B, N, _ = tokens.shape
        p = tower.num_prefix_tokens
        drawn = torch.rand(B, N - p, device=tokens.device).topk(stage.keep, dim=1).indices
        return torch.ones(B, N, device=tokens.device).scatter(1, drawn + p, 2.0)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Reduce as `Staged` does."""
        if context.replay is not None:  # advance the generator, so that later dropout agrees
            self.score(tower, stage, tokens, None)
        return super().step(tower, stage, tokens, context)


@dataclass(frozen=True)
class RandomPruning(RandomKeep):
    """Keep patches at random on ELIP's schedule: the control experiment.

    Attributes:
        schedule, merge, proportional: as of `ELIP`.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "control: random patches"

    schedule: Schedule | None = None
    merge: Merge = "one"
    proportional: bool = False


@dataclass(frozen=True)
class PatchDropout(RandomKeep):
    """Drop patches at random before block 0, in training alone (FLIP, Li et al., CVPR 2023).

    Attributes:
        keep_ratio: the share of patches that stay, in (0, 1]. None: the share that `keep` requires.
        until: the first training step that sees all patches again; None means that all steps drop.
            `for_step(step)` returns the strategy of a step.
    """

    name: ClassVar[str] = "patch_dropout"
    summary: ClassVar[str] = "drops random patches, in training only"
    place: ClassVar[str] = "before the first block"
    keep_field: ClassVar[str | None] = "keep_ratio"
    training_only: ClassVar[bool] = True

    keep_ratio: PositiveShare | None = None
    until: Count | None = None
    merge: ClassVar[Merge] = "none"

    def __post_init__(self) -> None:
        check_fields(self)

    def for_step(self, step: int) -> "PatchDropout":
        """Return the strategy of training step `step`, which drops nothing from `until` on.

        `reduce_(model, strategy=dropout.for_step(step))` in every step changes the model only once.
        """
        over = self.until is not None and step >= self.until
        return replace(self, keep_ratio=1.0, until=None) if over else replace(self, until=None)

    def fitted(self, tower: Tower) -> Self:
        """Return the strategy unchanged, after the checks of `Strategy.fitted`."""
        return Strategy.fitted(self, tower)

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return one stage of all blocks, or none if all patches stay."""
        keep = self._num_kept(size)
        return () if keep == size.num_patches else (Stage(0, size.depth, keep),)

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return the kept and the prefix tokens in every block."""
        tokens = size.num_prefix_tokens + self._num_kept(size)
        return (TokenCounts(tokens, tokens),) * size.depth

    def _num_kept(self, size: TowerSize) -> int:
        """Return the number of patches that stay."""
        return max(1, floor_of(self.with_rate(size).keep_ratio, size.num_patches))

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        return replace(self, keep_ratio=1 - strength * (1 - least_share(size)))
