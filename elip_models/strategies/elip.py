"""ELIP at one stage boundary: fuse the text into the CLS token, score, reduce (Eq. 1-4).

x~_cls = lam * x_cls + (1 - lam) * t_cls                                               Eq. 1
a      = CLS attention row of the stage's last layer, by the scorer, without gradient  Eq. 2
x      = [x_cls, x_kept, sum_dropped w x]                        elip_kernels.reduce, Eq. 3-4

The paper's towers have a CLS token. In a tower without one (SigLIP), the text alone is the query of
Eq. 2, as with lam = 0. Without text such a tower stays dense, unless the scorer is 'received'.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from elip_models.strategies.nearest import merge_nearest, nearest_flops
from elip_models.strategies.schedule import PAPER, Schedule, Stage
from elip_models.strategies.scorers import ScorerName, ScoringInput, get_scorer, row_of
from elip_models.strategies.strategy import Context, StageInfo, Strategy, TokenCounts
from elip_models.towers import Query, Tower, TowerSize
from elip_models.towers.base import scoring_context
from elip_models.towers.merge import Merge, check_merge
from elip_models.user_warnings import UnguidedWarning, warn_once
from elip_models.validation import Share, check_fields


class Staged(Strategy):
    """A strategy that reduces by a schedule, before the first block of each stage.

    A subclass has the fields `schedule` (a `Schedule`, its text, or None) and `merge`. It defines
    `score`. Without a schedule, it has the stages of the paper's, with the ratios that `keep` sets.
    """

    place: ClassVar[str] = "before each stage"
    keep_field: ClassVar[str | None] = "schedule"

    schedule: Schedule | None
    merge: Merge
    proportional: bool = False

    def __post_init__(self) -> None:
        if self.schedule is not None:
            object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        check_merge(self.merge)
        check_fields(self)
        if self.proportional and self.merge != "nearest":
            raise ValueError(
                "proportional: expected False unless merge='nearest', whose tokens have sizes, got "
                f"True with merge={self.merge!r}"
            )

    @property
    def replaces_block(self) -> bool:
        """Return whether token sizes also change the attention of a step's own block."""
        return self.proportional

    @property
    def replaces_later(self) -> bool:
        """Return whether token sizes change the attention of the blocks after a step."""
        return self.proportional

    def fitted(self, tower: Tower) -> Self:
        """Return the strategy with its schedule scaled to the tower's depth."""
        fitted = super().fitted(tower)
        if self.schedule is None:
            return fitted
        return replace(fitted, schedule=self.schedule.for_depth(tower.depth))

    def schedule_for(self, size: TowerSize) -> Schedule:
        """Return the schedule for the depth of a tower."""
        return self.with_rate(size).schedule.for_depth(size.depth)

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return the stages of the schedule."""
        return self.schedule_for(size).stages(size.num_patches)

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return the tokens in each block, as the schedule sets them."""
        tokens = self.schedule_for(size).tokens_per_layer(
            size.num_patches, num_merged=self.num_merged, num_prefix_tokens=size.num_prefix_tokens
        )
        return tuple(TokenCounts(n, n) for n in tokens)

    def tokens_entering(self, size: TowerSize) -> list[int]:
        """Return the number of tokens that enter the reduction of each stage."""
        counts = self.token_counts(size)
        firsts = [stage.first for stage in self.stages(size)]
        return [counts[i - 1].mlp if i else size.num_tokens for i in firsts]

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of merging into the nearest token; a subclass adds its scorer's."""
        if self.merge != "nearest":
            return 0
        steps = zip(self.stages(size), self.tokens_entering(size), strict=True)
        return sum(size.keys_flops(n) + nearest_flops(size, n, stage.keep) for stage, n in steps)

    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        """Return the row (B, N) that selects, without gradient; prefix columns are ignored."""
        raise NotImplementedError

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Score the tokens, then keep and merge them by that row."""
        if context.replay is not None:
            row = context.replay.attention
        else:
            row = self.score(tower, stage, tokens, context.text_cls)
        if self.merge != "nearest":
            tokens, info = tower.reduce(tokens, row, stage.keep, merge=self.merge)
            return tokens, StageInfo(stage, info, row)
        tokens, info = merge_nearest(tower, stage, tokens, row, context)
        if self.proportional:
            tower = tower.with_positions(tower.positions_after(info.reduction))
            tokens = self.run_later_block(tower, stage.first, tokens, info)
        return tokens, info

    def run_later_block(self, tower: Tower, i: int, tokens: Tensor, previous: StageInfo) -> Tensor:
        """Run block i with log(size) of each key added to its attention scores."""
        bias = previous.sizes.log().to(tokens.dtype)[:, None, None]
        return tower.mlp(i, tower.attend(i, tokens, bias))

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        """Return the strategy with its schedule at that strength."""
        schedule = self.schedule or PAPER.for_depth(size.depth)
        return replace(self, schedule=schedule.at_strength(size.num_patches, strength))


class Guided(Strategy):
    """A strategy that scores tokens by the fused CLS token of Eq. 1.

    A subclass has the fields `fusion`, `guidance_norm` and `without_text` of `ELIPOptions`.
    """

    fusion: float
    guidance_norm: str
    without_text: str | None

    @property
    def uses_query(self) -> bool:
        """Return whether the CLS token or a text changes the scores."""
        return True

    @property
    def is_guided(self) -> bool:
        """Return whether the text changes the scores."""
        return self.uses_query and self.fusion < 1.0

    def fitted(self, tower: Tower) -> Self:
        """Return the strategy with `without_text` set: 'dense' for a tower without CLS token."""
        by_tower = "vision" if tower.has_cls else "dense"
        return replace(super().fitted(tower), without_text=self.without_text or by_tower)

    def why_unsupported(self, tower: Tower) -> str | None:
        """Return why the tower cannot be scored: without CLS token it needs a text."""
        reason = super().why_unsupported(tower)
        if reason is not None or tower.has_cls or not self.uses_query:
            return reason
        if self.fusion == 1.0 or self.without_text == "vision":
            return (
                "the tower has no CLS token, so a text alone can score its patches "
                "(without_text='dense', fusion below 1), or they one another (scorer='received')"
            )
        if self.guidance_norm == "match":
            return "guidance_norm='match' needs the norm of a CLS token, and the tower has none"
        return None

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        if text_cls is not None or not self.is_guided or self.without_text != "dense":
            return True
        if not torch.compiler.is_compiling():
            warn_once(
                "no text guidance was given, so nothing is reduced (without_text='dense'); "
                "pass text_cls, or without_text='vision' for vision-only reduction",
                UnguidedWarning,
            )
        return False


@dataclass(frozen=True)
class ELIP(Guided, Staged):
    """Drop and merge tokens in stages, guided by a text (ELIP, Algorithm 1).

        elip_models.reduce_(model, strategy=ELIP("2(100%) 10(50%)", scorer="exact"))

    Attributes:
        schedule: text such as '2(100%) 2(90%) 6(65%) 2(40%)', whose layers add up to the tower's
            depth; or a preset, 'clip', 'albef', 'blip' or 'meter', the paper's schedules, which are
            scaled to it. None: these stages, with the ratios that `keep` requires.
        scorer, fusion, guidance_norm, without_text, merge, proportional: see `ELIPOptions`. The
            paper uses scorer='exact' and without_text='dense', and so do its models here.

    Raises:
        TypeError, ValueError: naming the argument, the requirement and the value.
    """

    name: ClassVar[str] = "elip"
    summary: ClassVar[str] = "the paper's stages, text-guided, with the fast scorer `last`"

    schedule: Schedule | None = None
    scorer: ScorerName = "last"
    fusion: Share = 0.8
    guidance_norm: Literal["none", "match"] = "none"
    without_text: Literal["dense", "vision"] | None = None
    merge: Merge = "one"
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = self.schedule or PAPER
        lengths = [layers for layers, ratio in schedule.groups if ratio < 1]
        shortest = min(lengths) if lengths else schedule.depth
        if isinstance(self.scorer, int) and self.scorer > shortest:
            raise ValueError(
                f"scorer: expected 1 <= m <= {shortest}, the layers of the shortest stage of "
                f"'{schedule}', got {self.scorer}"
            )

    @property
    def uses_query(self) -> bool:
        """Return whether the scorer reads the CLS token or a text."""
        return get_scorer(self.scorer).uses_query

    @property
    def runs_blocks(self) -> bool:
        """Return whether the scorer runs whole layers."""
        return get_scorer(self.scorer).layers(2) > 0

    def why_unsupported(self, tower: Tower) -> str | None:
        reason = super().why_unsupported(tower)
        if reason is None and not tower.has_cls and self.scorer in ("official", "cls"):
            return (
                f"scorer={self.scorer!r} takes a CLS token through the layers, and the tower has "
                "none; 'last', 'exact' and an int read the text's row from the patches"
            )
        return reason

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of the scorer in all stages."""
        scorer, total = get_scorer(self.scorer), super().scoring_flops(size)
        for stage, tokens in zip(self.stages(size), self.tokens_entering(size), strict=True):
            total += scorer.layers(stage.layers) * size.block_flops(tokens, tokens)
            total += scorer.attention_sublayers(stage.layers) * size.block_flops(tokens, 0)
            total += scorer.rows(stage.layers) * size.row_flops(tokens)
            total += scorer.cls_blocks(stage.layers) * size.block_flops(1, 1)
            total += scorer.received(stage.layers) * size.received_flops(tokens)
        return total

    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        """Return the row (B, N) of the scorer."""
        with scoring_context(tower.trunk, tokens):
            query = query_of(tower, tokens, text, self) if self.uses_query else None
            return row_of(get_scorer(self.scorer), tower, stage, tokens, query)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Fuse, score and reduce; in one op if the scorer reads the row of one block."""
        read = get_scorer(self.scorer).read
        drops = stage.keep < tokens.shape[1] - tower.num_prefix_tokens
        if read is None or not drops or self.merge == "nearest":
            return super().step(tower, stage, tokens, context)
        row = None if context.replay is None else context.replay.attention
        with scoring_context(tower.trunk, tokens):
            query = query_of(tower, tokens, context.text_cls, self)
            reading = ScoringInput(stage.last, tokens, query)
            if row is None:
                reading = read(tower, stage, tokens, query)
        layer, scored, query = reading
        reduced, info, row = tower.score_reduce(
            layer, tokens, scored, query, keep=stage.keep, merge=self.merge, row=row
        )
        return reduced, StageInfo(stage, info, row)


def check_text(text_cls: Tensor, expected: tuple[int, int], device: torch.device) -> None:
    """Raise TypeError or ValueError unless the guidance is (B, D), D the tower's width."""
    if not isinstance(text_cls, Tensor) or not text_cls.is_floating_point():
        raise TypeError(f"text_cls: expected a floating-point tensor (B, D), got {text_cls!r:.80}")
    if tuple(text_cls.shape) != expected:
        raise ValueError(
            f"text_cls: expected (B, D) = {expected}, one vector of the tower's width an image, "
            f"got {tuple(text_cls.shape)}; project another width first (CLIP maps it back by the "
            "transposed image projection: text_features @ proj.T)"
        )
    if text_cls.device != device:
        raise ValueError(f"text_cls: expected it on {device}, got {text_cls.device}")


def query_of(tower: Tower, tokens: Tensor, text_cls: Tensor | None, strategy: Guided) -> Query:
    """Return token 0 and the text (B, D) or (1, D) to fuse with it; without CLS the text alone."""
    if text_cls is not None:
        if text_cls.shape[0] == 1:
            text_cls = text_cls.expand(tokens.shape[0], -1)
        check_text(text_cls, (tokens.shape[0], tokens.shape[2]), tokens.device)
    if not tower.has_cls:
        return Query(text_cls.to(tokens.dtype))
    fusion = 1.0 if text_cls is None else strategy.fusion
    return Query(tokens[:, 0], text_cls, fusion, strategy.guidance_norm)
