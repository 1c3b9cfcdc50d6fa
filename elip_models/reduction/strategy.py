"""What every reduction strategy is: frozen data that says where it acts and what it does there.

A step either stands before a block, which then runs as it is, or takes a block's place, because it
acts between its attention and its MLP. The engine (`step.py`) knows no more of a strategy than
this.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from elip_kernels import BipartiteInfo, ReductionInfo
from elip_models.reduction import flops
from elip_models.reduction.caching import SlowScorerWarning, once, warn_once
from elip_models.reduction.schedule import Schedule, Stage
from elip_models.towers import Tower, TowerSize, as_image_text, as_tower

Merge = bool | Literal["nearest"]
"""Dropped tokens become one token, or are dropped; or each joins the kept one most alike."""

LARGE = 2**20  # patches, of which no share below 1 rounds to all


class StageInfo(NamedTuple):
    """What one step did.

    stage: its place. reduction: which tokens were kept, and how the others were merged.
    attention: (B, N) the row that selected, prefix tokens included; None where none did.
    sizes: (B, N) how many patches each token stands for, where the strategy counts them.
    positions: (B, N-p) the patch that each token which leaves stands at, where the tower reads it.
    weights: (B, N) what each token counted in its row's sum beside its size; None: 1 each.
    """

    stage: Stage
    reduction: ReductionInfo | BipartiteInfo
    attention: Tensor | None = None
    sizes: Tensor | None = None
    positions: Tensor | None = None
    weights: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """(B, R) bool of the tokens that leave, True = real; None where all of them are."""
        return getattr(self.reduction, "mask", None)

    @property
    def mean_keep(self) -> Tensor | int:
        """Kept patches of an image, on average: a scalar where images keep different numbers."""
        if self.mask is None:
            return self.stage.keep
        p = self.reduction.num_prefix_tokens
        return self.mask[:, p : p + self.stage.keep].sum(1, dtype=torch.float32).mean()


def mask_after(infos: Sequence[StageInfo]) -> Tensor | None:
    """(B, N) bool of the tokens that the steps of a tower leave, True = real; None where all of
    them are.
    """
    return infos[-1].mask if infos else None


class Layer(NamedTuple):
    """Tokens in a block: those that go through its attention, and through its MLP."""

    attention: int
    mlp: int


class Context(NamedTuple):
    """What a step knows besides its tokens.

    text_cls: (B, D) guidance, detached, or None; a row of zeros is no text for its image.
    previous: what the step before did in this forward.
    replay: what this step has done already, and is to do again: in the forward that is recomputed
        now, or in another tower of the same images.
    row: (B, N) over its tokens, what selects in place of a scorer, or None.
    """

    text_cls: Tensor | None = None
    previous: StageInfo | None = None
    replay: StageInfo | None = None
    row: Tensor | None = None


class Strategy:
    """How tokens leave a tower. Subclasses are frozen dataclasses, and define what raises here.

    A strategy of your own is one too: `stages`, `token_counts`, `step` and `at_strength`, if it
    stands before blocks (`examples/own_strategy.py`); where it follows a schedule, `score` alone
    (`Staged` in strategies/elip.py). `reduce_` and `encode_image` take an instance, and know it by
    name once `elip_models.STRATEGIES[name]` is the class.

    name: in `STRATEGIES`.
    replaces_block: its steps take a block's place; else they stand before it.
    replaces_later: behind its first step all blocks run as `later` says, where no step is.
    runs_blocks: its steps run whole blocks that do not count, to choose by what they say.
    changes_embedding: it takes the place of what makes tokens of images, by its `patchify`.
    is_guided: text changes what it does.
    merge: how every patch becomes part of a token that leaves; False: some are dropped.
    pads: an image may have fewer tokens than its batch, and slots of padding in their place.
    """

    name: ClassVar[str]
    replaces_block: ClassVar[bool] = False
    replaces_later: ClassVar[bool] = False
    runs_blocks: bool = False
    changes_embedding: ClassVar[bool] = False
    is_guided: bool = False
    merge: Merge = False
    pads: ClassVar[bool] = False

    def refuses(self, tower: Tower) -> str | None:
        """Why this tower cannot be reduced so, in one sentence, or None."""
        return None

    def fitted(self, tower: Tower) -> Self:
        """The strategy for this tower: what its settings leave open is decided.

        Raises:
            TypeError: the tower cannot be reduced so: why.
            ValueError: settings that do not fit the tower.
        """
        reason = self.refuses(tower)
        if reason is not None:
            raise TypeError(f"strategy: expected one for this model, got {self.name!r}: {reason}")
        if self.stages(tower.size) and not self.merge:
            reason = tower.refuses_dropping()
        if reason is not None:
            raise TypeError(
                f"strategy: expected one that merges or drops nothing, got {self.name!r}: {reason}"
            )
        return self

    def at(self, step: int) -> "Strategy":
        """What step `step` of training, 0-based, is reduced by."""
        return self

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Where it acts, in the order of the blocks; at most one step a block.

        Raises:
            ValueError: settings that do not fit the tower.
        """
        raise NotImplementedError

    def token_counts(self, size: TowerSize) -> tuple[Layer, ...]:
        """Tokens in each block, prefix tokens and merged ones included; FLOPs follow."""
        raise NotImplementedError

    def scoring_flops(self, size: TowerSize) -> int:
        """What it computes to choose tokens, without gradient, beyond the blocks; of one image."""
        return 0

    def embed_flops(self, size: TowerSize) -> int:
        """Of the patch embedding of one image."""
        return size.embed_flops()

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        """Whether a forward with this guidance, in this mode, reduces."""
        return True

    def embed(self, tower: Tower, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> tokens (B, N, D) before block 0."""
        if self.changes_embedding:
            return tower.enter(self.patchify(tower, images))
        return tower.embed(images)

    def patchify(self, tower: Tower, images: Tensor) -> Tensor:
        """What the tower's entrance makes of images (B, 3, H, W), if the embedding changes."""
        raise NotImplementedError

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """The tokens before block `stage.first`, reduced; or after it, if it takes its place.

        `tower.reduce(tokens, row, stage.keep, merge=..)` selects and merges by a row of scores.

        Args:
            tower: of the blocks.
            stage: of `stages`.
            tokens: (B, N, D), `tower.num_prefix_tokens` of them first, which stay there.
            context: where it has a `replay`, what that did is done again, and nothing is chosen,
                drawn or scored anew.

        Returns:
            (B, M, D), M as `token_counts` says of this block's MLP, and what was done.
        """
        raise NotImplementedError

    def later(self, tower: Tower, i: int, tokens: Tensor, previous: StageInfo) -> Tensor:
        """The tokens after block i, which stands behind a step and has none, if it `replaces_later`
        blocks.
        """
        raise NotImplementedError

    def at_strength(self, size: TowerSize, strength: float) -> Self:
        """The same strategy, reducing nothing (0) to as much as it can (1).

        Where it reduces, more never costs more; `at_flops` searches here.
        """
        raise NotImplementedError

    def at_flops(self, model: nn.Module | Tower, ratio: float, *, training: bool = True) -> Self:
        """The same strategy at the setting whose FLOPs are `ratio` of the dense tower's.

        Args:
            model: an image model, or a whole one, whose image tower counts; or a tower.
            ratio: of forward and backward, scorer included, in (0, 1]; met within 1%.
            training: False counts the forward alone, of which a scorer is a larger part.

        Raises:
            ValueError: a ratio that the strategy cannot reach, with the nearest that it can.
        """
        return flops.at_flops(self, tower_of(model).size, ratio, training=training)

    def at_keep(self, model: nn.Module | Tower, keep: float) -> Self:
        """The same strategy at the setting that leaves nearest to `keep` of the tokens.

        Args:
            model: as of `at_flops`.
            keep: the mean share of the dense tower's tokens over its layers, in (0, 1].

        Raises:
            ValueError: less than the strategy can leave.
        """
        return flops.at_keep(self, tower_of(model).size, keep)

    def __str__(self) -> str:
        """Its name and its settings."""
        said = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self))
        return f"{self.name}({', '.join(said)})"


def _short(value: Any) -> str:
    """A setting as its class takes it; shares to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(str(value) if isinstance(value, (str, Schedule)) else value)


@once
def stages_of(strategy: Strategy, size: TowerSize) -> dict[int, Stage]:
    """`strategy.stages` by the block where each acts, worked out once and not in every forward."""
    return {stage.first: stage for stage in strategy.stages(size)}


@once
def blocks_of(strategy: Strategy, size: TowerSize) -> tuple[int, ...]:
    """The blocks where it may act, on an image of any size: those where it does on a large one."""
    if strategy.changes_embedding:
        return tuple(stages_of(strategy, size))
    return tuple(stages_of(strategy, size._replace(num_patches=LARGE)))


@once
def tokens_entering(strategy: Strategy, size: TowerSize) -> tuple[int, ...]:
    """Tokens that enter each block."""
    return size.num_tokens, *(layer.mlp for layer in strategy.token_counts(size))


def tower_of(model: nn.Module | Tower) -> Tower:
    """The tower of an image model, or of the image model inside a whole one."""
    if isinstance(model, Tower):
        return model
    image_text = as_image_text(model)
    return as_tower(model if image_text is None else image_text.image_model)


def warn_if_slower(tower: Tower, strategy: Strategy, size: TowerSize) -> None:
    """In eval mode, say once that choosing the tokens of an image of that size costs more than
    dropping them saves.
    """
    if tower.model.training or torch.compiler.is_compiling():
        return
    cost = flops.inference_ratio(strategy, size)
    if cost > 1.0:
        scorer = getattr(strategy, "scorer", strategy.name)
        warn_once(
            f"scorer={scorer!r} makes inference cost {cost:.2f} times the dense tower "
            "(FLOPs of the blocks); scorer='last' costs less than dense",
            SlowScorerWarning,
        )


def counts_of(size: TowerSize, left: Callable[[int, int], int]) -> tuple[Layer, ...]:
    """The layers, where `left(i, tokens)` of the tokens in block i go on to its MLP."""
    layers, tokens = [], size.num_tokens
    for i in range(size.depth):
        layers.append(Layer(tokens, left(i, tokens)))
        tokens = layers[-1].mlp
    return tuple(layers)


def least_share(size: TowerSize) -> float:
    """Of the patches, so that one stays."""
    return min(1.0, 1.5 / size.num_patches)
