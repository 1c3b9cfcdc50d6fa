"""ELIP, one stage boundary: fuse the text into CLS, score, reduce (Eq. 1-4).

x~_cls = lam * x_cls + (1 - lam) * t_cls                                               Eq. 1
a      = CLS attention row of the stage's last layer, by the scorer, without gradient  Eq. 2
x      = [x_cls, x_kept, sum_dropped w x]                        elip_kernels.reduce, Eq. 3-4

A tower without CLS (SigLIP) is not the paper's: it has nothing to fuse with, so the text alone is
the query of Eq. 2, as with lam = 0, in the space of the tokens that a layer reads. Selection and
merging are the paper's. Without text the tower stays dense, but for scorer `received`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, TypedDict

import torch
from torch import Tensor

from elip_models.reduction.caching import UnguidedWarning, warn_once
from elip_models.reduction.nearest import merge_nearest, nearest_flops
from elip_models.reduction.schedule import PAPER, Schedule, Stage
from elip_models.reduction.scorers import ScorerName, ScoringInput, get_scorer, row_of
from elip_models.reduction.strategy import Context, Layer, Merge, StageInfo, Strategy
from elip_models.towers import Query, Tower, TowerSize
from elip_models.towers.scoring_context import scoring_context
from elip_models.validation import Share, check_fields


class ELIPOptions(TypedDict, total=False):
    """The options of ELIP besides its schedule, as keywords of whoever passes them on.

    scorer: 'last', the default, runs no layer twice; 'exact' is the paper's, 'official' its code's,
        'bf16', 'alternate', 'attention', 'cls' and 'mean' stand between (`scorers.py`); or m: m-1
        whole layers, then the m-th's row. By 'received' all tokens score one another: it needs
        neither CLS nor text, and reads none.
    fusion: lam of Eq. 1, by default 0.8; 1 is vision-only, 0 text-only.
    guidance_norm: 'match' rescales the text to the norm of the image's CLS token; by default
        'none'.
    without_text: where no text is given, 'vision' reduces by the image alone, 'dense' reduces
        nothing. The default is 'vision', and 'dense' of a tower without CLS, which a text scores.
    merge: True, the default, appends one token merged of all that are dropped; 'nearest' merges
        each into the kept one whose key is most alike; False drops them.
    proportional: with merge='nearest', add log(size) of each key to the scores of the blocks that
        follow, as ToMe does; by default False.
    """

    scorer: ScorerName | None
    fusion: Share | None
    guidance_norm: Literal["none", "match"] | None
    without_text: Literal["dense", "vision"] | None
    merge: Merge | None
    proportional: bool | None


class Staged(Strategy):
    """A strategy that reduces by a schedule, before the first block of each stage.

    A subclass has `schedule`, also as it is written, and `merge` among its fields, and a `score`.
    """

    schedule: Schedule
    merge: Merge
    proportional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        check_fields(self)
        if self.proportional and self.merge != "nearest":
            raise ValueError(
                "proportional: expected False unless merge='nearest', whose tokens have sizes, got "
                f"True with merge={self.merge!r}"
            )

    @property
    def replaces_block(self) -> bool:
        """Sizes weigh in the attention of a step's own block too."""
        return self.proportional

    @property
    def replaces_later(self) -> bool:
        return self.proportional

    def fitted(self, tower: Tower) -> Self:
        """With the schedule of the tower's depth."""
        return replace(super().fitted(tower), schedule=self.schedule.for_depth(tower.depth))

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """The schedule's."""
        return self.schedule.for_depth(size.depth).stages(size.num_patches)

    def token_counts(self, size: TowerSize) -> tuple[Layer, ...]:
        tokens = self.schedule.for_depth(size.depth).tokens_per_layer(
            size.num_patches, merge=self.merge is True, num_prefix_tokens=size.num_prefix_tokens
        )
        return tuple(Layer(n, n) for n in tokens)

    def tokens_entering(self, size: TowerSize) -> list[int]:
        """Tokens that enter each stage's reduction."""
        counts = self.token_counts(size)
        firsts = [stage.first for stage in self.stages(size)]
        return [counts[i - 1].mlp if i else size.num_tokens for i in firsts]

    def scoring_flops(self, size: TowerSize) -> int:
        """Of merging into the nearest, to which a subclass adds what its rows cost."""
        if self.merge != "nearest":
            return 0
        steps = zip(self.stages(size), self.tokens_entering(size), strict=True)
        return sum(size.keys_flops(n) + nearest_flops(size, n, stage.keep) for stage, n in steps)

    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        """The row (B, N) that selects, without gradient; prefix tokens' columns are not read."""
        raise NotImplementedError

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        if context.replay is not None:
            row = context.replay.attention
        elif context.row is not None:
            row = context.row
        else:
            row = self.score(tower, stage, tokens, context.text_cls)
        if self.merge != "nearest":
            tokens, info = tower.reduce(tokens, row, stage.keep, merge=self.merge)
            return tokens, StageInfo(stage, info, row)
        tokens, info = merge_nearest(tower, stage, tokens, row, context)
        if self.proportional:
            tower = tower.at(tower.positions_after(info.reduction))
            tokens = self.later(tower, stage.first, tokens, info)
        return tokens, info

    def later(self, tower: Tower, i: int, tokens: Tensor, previous: StageInfo) -> Tensor:
        """Block i, which attends to a token as often as it holds patches."""
        bias = previous.sizes.log().to(tokens.dtype)[:, None, None]
        return tower.mlp(i, tower.attend(i, tokens, bias))

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        return replace(self, schedule=self.schedule.at_strength(size.num_patches, strength))


class Guided(Strategy):
    """A strategy that reads which tokens are asked for by the fused CLS token of Eq. 1.

    A subclass has `fusion`, `guidance_norm` and `without_text` of `ELIPOptions` among its fields.
    """

    fusion: float
    guidance_norm: str
    without_text: str | None

    @property
    def uses_query(self) -> bool:
        """The CLS token, or a text, says what matters."""
        return True

    @property
    def is_guided(self) -> bool:
        return self.uses_query and self.fusion < 1.0

    def fitted(self, tower: Tower) -> Self:
        """Without text by the tower's CLS token, if it has one."""
        by_tower = "vision" if tower.has_cls else "dense"
        return replace(super().fitted(tower), without_text=self.without_text or by_tower)

    def refuses(self, tower: Tower) -> str | None:
        reason = super().refuses(tower)
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
        """Whether a forward with this guidance reduces; warns once where it does not."""
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
    """Text-guided dropping and merging in stages (ELIP, Algorithm 1).

    schedule: as '2(100%) 2(90%) 6(65%) 2(40%)', whose layers add up to the tower's depth; or a
        preset, 'clip', 'albef', 'blip' or 'meter', scaled to it.
    scorer, fusion, guidance_norm, without_text, merge, proportional: see `ELIPOptions`. The paper
        scores by 'exact' and leaves images without text as they were ('dense'), and so do its
        models here.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """

    name: ClassVar[str] = "elip"

    schedule: Schedule = PAPER
    scorer: ScorerName = "last"
    fusion: Share = 0.8
    guidance_norm: Literal["none", "match"] = "none"
    without_text: Literal["dense", "vision"] | None = None
    merge: Merge = True
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = [layers for layers, ratio in self.schedule.groups if ratio < 1]
        shortest = min(lengths) if lengths else self.schedule.depth
        if isinstance(self.scorer, int) and self.scorer > shortest:
            raise ValueError(
                f"scorer: expected 1 <= m <= {shortest}, the layers of the shortest stage of "
                f"'{self.schedule}', got {self.scorer}"
            )

    @property
    def uses_query(self) -> bool:
        return get_scorer(self.scorer).uses_query

    @property
    def runs_blocks(self) -> bool:
        return get_scorer(self.scorer).layers(2) > 0

    def refuses(self, tower: Tower) -> str | None:
        reason = super().refuses(tower)
        if reason is None and not tower.has_cls and self.scorer in ("official", "cls"):
            return (
                f"scorer={self.scorer!r} takes a CLS token through the layers, and the tower has "
                "none; 'last', 'exact' and an int read the text's row from the patches"
            )
        return reason

    def scoring_flops(self, size: TowerSize) -> int:
        scorer, total = get_scorer(self.scorer), super().scoring_flops(size)
        for stage, tokens in zip(self.stages(size), self.tokens_entering(size), strict=True):
            total += scorer.layers(stage.layers) * size.block_flops(tokens, tokens)
            total += scorer.attention_halves(stage.layers) * size.block_flops(tokens, 0)
            total += scorer.rows(stage.layers) * size.row_flops(tokens)
            total += scorer.cls_blocks(stage.layers) * size.block_flops(1, 1)
            total += scorer.received(stage.layers) * size.received_flops(tokens)
        return total

    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        with scoring_context(tower.model, tokens):
            query = query_of(tower, tokens, text, self) if self.uses_query else None
            return row_of(get_scorer(self.scorer), tower, stage, tokens, query)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Fuse, score, reduce; what reads and reduces is one op where one block's row selects."""
        read = get_scorer(self.scorer).read
        drops = stage.keep < tokens.shape[1] - tower.num_prefix_tokens
        if read is None or context.row is not None or not drops or self.merge == "nearest":
            return super().step(tower, stage, tokens, context)
        row = None if context.replay is None else context.replay.attention
        with scoring_context(tower.model, tokens):
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
    """Raises where the guidance is not one vector of the tower's width for each image, (B, D)."""
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


def checked_text(tokens: Tensor, text_cls: Tensor | None) -> Tensor | None:
    """The text (B, D) that guides `tokens`, of which (1, D) is for all images; None where none
    does.
    """
    if text_cls is None:
        return None
    if text_cls.shape[0] == 1:
        text_cls = text_cls.expand(tokens.shape[0], -1)
    check_text(text_cls, (tokens.shape[0], tokens.shape[2]), tokens.device)
    return text_cls


def query_of(tower: Tower, tokens: Tensor, text_cls: Tensor | None, strategy: Guided) -> Query:
    """Token 0 and the text that it is fused with; without CLS the text itself.

    text_cls: (B, D), or (1, D) for all images.
    """
    text = checked_text(tokens, text_cls)
    if not tower.has_cls:
        return Query(text.to(tokens.dtype))
    return Query(tokens[:, 0], text, strategy.fusion, strategy.guidance_norm)


def fused_cls(tower: Tower, tokens: Tensor, text_cls: Tensor | None, strategy: Guided) -> Tensor:
    """Token 0 fused with a text by Eq. 1; without CLS the text itself."""
    return query_of(tower, tokens, text_cls, strategy).fused()
