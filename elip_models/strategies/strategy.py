"""The base class of reduction strategies, and the data that the engine exchanges with them.

A strategy is frozen data: where a tower is reduced, and what happens there. A step either runs
before a block, which then runs unchanged, or replaces the block, because it acts between its
attention and its MLP. The engine (`engine/forward_state.py`) depends on this interface alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from elip_kernels import BipartiteInfo, ReductionInfo
from elip_models.strategies import flops
from elip_models.strategies.flops import CostModel, TokenCounts
from elip_models.strategies.schedule import Schedule, Stage
from elip_models.strategies.token_assignment import slots_of
from elip_models.towers import Tower, TowerSize, as_image_text, as_tower
from elip_models.towers.merge import Merge, check_merge


class StageInfo(NamedTuple):
    """The result of one step.

    Attributes:
        stage: where the step ran.
        reduction: which tokens were kept, and how the others were merged.
        attention: (B, N) the row of scores that selected, prefix tokens included, or None.
        sizes: (B, N) the number of patches in each token, if the strategy counts them.
        positions: (B, N-p) the position of each remaining patch token, if the tower needs it.
        places: (B, N, 2) the row and column of each token, if the strategy needs them.
        shift: (B, N, D) how far the step moved the values of the tokens that it merged, see
            `Context.shift`. Only a step that replaces its block must give it; records have None.
    """

    stage: Stage
    reduction: ReductionInfo | BipartiteInfo
    attention: Tensor | None = None
    sizes: Tensor | None = None
    positions: Tensor | None = None
    places: Tensor | None = None
    shift: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """Return (B, R) bool over the remaining tokens, False for padding; None without padding."""
        return self.reduction.mask


class Context(NamedTuple):
    """The inputs of a step beside its tokens.

    Attributes:
        text_cls: (B, D) the detached guidance, or None; a row of zeros means no text for its image.
        previous: the result of the previous step in this forward pass.
        replay: the earlier result that this step must reproduce: of the forward pass that is now
            recomputed, or of another tower that read the same images.
        mask: (B, N) bool, False for padding; None in a batch without padding.
        keep: (B,) the number of patches that each image of a padded batch keeps, or None.
        keeps_shifts: a block will return all tokens of block 0, see `token_assignment.py`.
    """

    text_cls: Tensor | None = None
    previous: StageInfo | None = None
    replay: StageInfo | None = None
    mask: Tensor | None = None
    keep: Tensor | None = None
    keeps_shifts: bool = False

    def shift(
        self, before: Tensor, after: Tensor, reduction: BipartiteInfo | ReductionInfo
    ) -> Tensor | None:
        """Return how far a step moves the values of tokens (B, N, D), which leave it as (B, R, D).

        None if no block will return all tokens of block 0.
        """
        return slots_of(reduction).unmerged(after).sub_(before) if self.keeps_shifts else None


class Strategy(CostModel):
    """A way to reduce the tokens of a tower. Subclasses are frozen dataclasses.

    To write one, define `stages`, `token_counts`, `step` and `at_strength` (see
    `examples/own_strategy.py`). To follow a schedule, subclass `Staged` (strategies/elip.py); it
    needs two fields and `score`. `reduce_` and `encode_image` take an instance. Set
    `elip_models.STRATEGIES[name]` to the class to use it by its name.

    Attributes:
        name: the key in `elip_models.STRATEGIES`.
        summary: what the strategy does, in at most ten words.
        place: where it acts, such as 'every block'.
        keep_field: the field that sets how many tokens stay. `reduce_(keep=..)` sets it, and raises
            an error if the caller sets both. If the field is None, the rate is `DEFAULT_KEEP`.
            Without such a field (None), `keep` has no meaning.
        replaces_block: a step replaces its block; otherwise it runs before the block.
        replaces_later: `run_later_block` replaces every block without a step after the first step.
        runs_blocks: a step runs whole blocks to compute its scores; their outputs are discarded.
        changes_embedding: the tower reads the images of `resize`, with interpolated positions.
        is_guided: the text changes the result.
        merge: what becomes of dropped tokens, see `Merge`.
        drops_patches: the last block returns no patch, only the class token.
        takes_padding: a step takes a padded batch, see `Context.mask`; others raise an error.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    place: ClassVar[str] = ""
    keep_field: ClassVar[str | None] = None
    replaces_block: ClassVar[bool] = False
    replaces_later: ClassVar[bool] = False
    runs_blocks: bool = False
    changes_embedding: ClassVar[bool] = False
    is_guided: bool = False
    merge: Merge = "none"
    drops_patches: bool = False
    takes_padding: ClassVar[bool] = False

    @property
    def num_merged(self) -> int:
        """Return the number of merged tokens that a stage appends: 1 with merge='one', else 0."""
        return int(self.merge == "one")

    def why_unsupported(self, tower: Tower) -> str | None:
        """Return why this strategy cannot reduce the tower, in one sentence, or None if it can."""
        return None

    def fitted(self, tower: Tower) -> Self:
        """Return the strategy with its open settings set for this tower.

        Raises:
            TypeError: the strategy cannot reduce the tower, with the reason.
            ValueError: settings that do not fit the tower.
        """
        check_merge(self.merge)
        reason = self.why_unsupported(tower)
        if reason is not None:
            raise TypeError(f"strategy: expected one for this model, got {self.name!r}: {reason}")
        strongest = self.at_strength(tower.size, 1.0) if self.has_open_rate else self
        if strongest.stages(tower.size) and self.merge == "none":
            reason = tower.refuses_dropping()
        if reason is not None:
            raise TypeError(
                f"strategy: expected one that merges or drops nothing, got {self.name!r}: {reason}"
            )
        return self

    @property
    def has_open_rate(self) -> bool:
        """Return whether the strategy has a `keep_field`, and its value is None."""
        return self.keep_field is not None and getattr(self, self.keep_field) is None

    def with_rate(self, size: TowerSize) -> Self:
        """Return the strategy with its `keep_field` set: None becomes at most `DEFAULT_KEEP`."""
        if not self.has_open_rate:
            return self
        return flops.at_keep(self, size, min(flops.DEFAULT_KEEP, flops.most_kept(self, size)))

    def for_step(self, step: int) -> "Strategy":
        """Return the strategy for training step `step`, counted from 0."""
        return self

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return where the strategy acts, in the order of the blocks; at most one step per block.

        Raises:
            ValueError: settings that do not fit the tower.
        """
        raise NotImplementedError

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        """Return whether a forward pass with this guidance, in this mode, is reduced."""
        return training or not self.training_only

    def resized(self, size: TowerSize) -> TowerSize:
        """Return the size of the tower that reads the images of `resize`."""
        return size

    def resize(self, tower: Tower, images: Tensor) -> Tensor:
        """Return the images (B, 3, h, w) that the tower reads, of images (B, 3, H, W)."""
        return images

    def embed(self, tower: Tower, images: Tensor) -> Tensor:
        """Return the tokens (B, N, D) before block 0 of images that `resize` has returned."""
        if self.changes_embedding:
            return tower.enter(tower.patchify(images))
        return tower.embed(images)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Reduce the tokens before block `stage.first`, or run that block reduced.

        `tower.reduce(tokens, row, stage.keep, merge=..)` selects and merges by a row of scores.

        Args:
            tower: the tower whose blocks run.
            stage: one of `stages`.
            tokens: (B, N, D); the first `tower.num_prefix_tokens` must stay in place.
            context: if it has a `replay`, the step must reproduce it, without a new choice, a new
                random draw or a new score.

        Returns:
            Tokens (B, M, D), with M the count of this block's MLP in `token_counts`, and the
            `StageInfo`.
        """
        raise NotImplementedError

    def run_later_block(self, tower: Tower, i: int, tokens: Tensor, previous: StageInfo) -> Tensor:
        """Run block i, which follows a step and has none, if `replaces_later`."""
        raise NotImplementedError

    def at_flops(self, model: nn.Module | Tower, ratio: float, *, training: bool = True) -> Self:
        """Return the strategy at the setting that costs `ratio` of the dense tower's FLOPs.

        Args:
            model: an image model, an image-text model (its image tower counts), or a tower.
            ratio: the target in (0, 1], scorer included; the result is within 1% of it.
            training: count forward and backward; False counts the forward pass alone.

        Raises:
            ValueError: a ratio that the strategy cannot reach, with the nearest that it can.
        """
        return flops.at_flops(self, tower_of(model).size, ratio, training=training)

    def at_keep(self, model: nn.Module | Tower, keep: float) -> Self:
        """Return the strategy at the setting that leaves nearest to `keep` of the tokens.

        Args:
            model: an image model, an image-text model (its image tower counts), or a tower.
            keep: the mean share of the dense tower's tokens over its layers, in (0, 1].

        Raises:
            ValueError: less than the strategy can leave.
        """
        return flops.at_keep(self, tower_of(model).size, keep)

    def __str__(self) -> str:
        """Return the name, the number of tokens, and the settings that are not the default."""
        return strategy_text(self, self.keep_field)


def strategy_text(strategy: Any, keep_field: str | None) -> str:
    """Return a strategy's name, the field that sets its tokens, and what is not the default."""
    settings = (
        f"{field.name}={_short(value)}"
        for field in fields(strategy)
        if (value := getattr(strategy, field.name)) is not None
        and (field.name == keep_field or value != field.default)
    )
    return f"{strategy.name}({', '.join(settings)})"


def _short(value: Any) -> str:
    """Return a setting as Python source; floats with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(str(value) if isinstance(value, (str, Schedule)) else value)


def tower_of(model: nn.Module | Tower) -> Tower:
    """Return the tower of an image model, or of the image model in an image-text model."""
    if isinstance(model, Tower):
        return model
    image_text = as_image_text(model)
    return as_tower(model if image_text is None else image_text.image_model)


def counts_of(size: TowerSize, left: Callable[[int, int], int]) -> tuple[TokenCounts, ...]:
    """Return the layers if block i, given n tokens, passes `left(i, n)` on to its MLP."""
    layers, tokens = [], size.num_tokens
    for i in range(size.depth):
        layers.append(TokenCounts(tokens, left(i, tokens)))
        tokens = layers[-1].mlp
    return tuple(layers)


def refuse_symbols(sizes: Iterable[int], name: str) -> None:
    """Raise ValueError if an exported graph has a symbol in place of one of these image sizes."""
    if not torch.compiler.is_exporting():
        return
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    if not all(has_static_value(size) for size in sizes):
        raise ValueError(
            f"dynamic_shapes: expected one image size in an exported graph with {name!r}, got any "
            "size; export a graph for each size, or use another strategy, such as 'merge'"
        )


def least_share(size: TowerSize) -> float:
    """Return the share of the patches that keeps one patch."""
    return min(1.0, 1.5 / size.num_patches)
