"""One forward pass of a tower under a strategy, block by block.

    step = forward.enter_block(i, tokens)       the strategy acts, before block i or in its place
    tokens = block(step.tokens)                 unless the step replaced the block

The state of one forward pass is its `ForwardState`. The caller that runs the blocks makes one, and
enters the blocks in order: `encode_image`, the blocks of a reduced model, pictures and benchmarks.
It alone writes what the pass has recorded, when the caller stores the result of a block. Entering a
block does not: a compiler refuses a checkpoint that changes what is outside of it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from elip_kernels import ReductionInfo
from elip_models.engine.padding import Padding, padding_for, real_tokens
from elip_models.engine.reduction import Reduction
from elip_models.engine.step_plan import (
    StepPlan,
    cached_plan,
    inference_cost,
    make_plan,
    warn_of_cost,
    warn_unguided,
)
from elip_models.strategies.schedule import Stage
from elip_models.strategies.strategy import Context, StageInfo, Strategy
from elip_models.strategies.token_assignment import Slots, slots_after
from elip_models.towers import Tower


class BlockStep(NamedTuple):
    """The result of entering a block.

    tokens: the input of the block; its output if `replaced_block`.
    info: the result of the strategy's step, None without a step.
    positions: (B, N-p) the positions of the tokens, if the tower needs them and some tokens left.
    replaced_block: the block has run already.
    slots: where the tokens of block 0 are now, if the block must return all of them.
    changes_mask: the tokens are others than those of the model's own mask.
    mask: (B, N) bool, False for padding; None without padding.
    """

    tokens: Tensor
    info: StageInfo | None = None
    positions: Tensor | None = None
    replaced_block: bool = False
    slots: Slots | None = None
    changes_mask: bool = False
    mask: Tensor | None = None


class ForwardState:
    """One forward pass of a tower under a strategy.

    infos: the results of the steps, by block. A step whose result is here is replayed, so that a
        recomputation selects the same tokens.
    slots: `BlockStep.slots` after each step, by block.
    keeps_shifts: some block returns all tokens of block 0 with `Slots.shift`.
    counts: the tokens that enter each block, and those that leave the last; empty without steps.
    padding: of a padded batch, or None.
    guided_by: the owner of the guidance, see `Guide`.
    fingerprint: in a checkpoint, the sum (B, D) of the tokens that entered the first block.
    repeats: an earlier pass whose tokens this one has selected again.
    """

    def __init__(
        self,
        tower: Tower,
        strategy: Strategy,
        text_cls: Tensor | None = None,
        *,
        num_tokens: int | None = None,
        on_grid: bool = False,
        replays: Iterable[StageInfo] | None = None,
        real: Tensor | None = None,
    ) -> None:
        """Create the state of a forward pass.

        Args:
            tower: the tower whose blocks run.
            strategy: a strategy for this tower, see `Strategy.fitted`.
            text_cls: (B, D), the guidance, detached, or None.
            num_tokens: tokens that enter block 0; by default those of the tower's image size.
            on_grid: blocks take and return all tokens of block 0; see `Slots`.
            replays: results of steps on the same images elsewhere, which are repeated here.
            real: (B, N) bool, False for padding among the tokens that enter the first step; None
                means that there is no padding.
        """
        self.tower, self.strategy, self.text_cls = tower, strategy, text_cls
        self.size = tower.size
        if tower.has_dynamic_size and num_tokens is not None:
            if isinstance(num_tokens, Tensor):  # under torch.jit.trace
                num_tokens = int(num_tokens)
            patches = num_tokens - tower.num_prefix_tokens
            self.size = strategy.resized(tower.size)._replace(num_patches=patches)
        self.on_grid = on_grid
        self.unmerges = tower.pools and strategy.merge != "none"
        self.keeps_shifts = on_grid or tower.needs_grid is not None
        self.infos = {info.stage.first: info for info in replays or ()}
        self.slots: dict[int, Slots | None] = {}
        self.padding: Padding | None = None
        self.guided_by: object | None = None
        self.fingerprint: Tensor | None = None
        self.repeats: ForwardState | None = None
        if replays is not None:
            self.stages = {i: info.stage for i, info in self.infos.items()}
        elif strategy.reduces(text_cls, tower.trunk.training):
            padded = None if real is None else padding_for(strategy, tower, self.size, real)
            if padded is not None:
                self.padding, patches = padded
                self.size = self.size._replace(num_patches=patches)
                self.unmerges = True
            self.stages = self._plan().stages
            is_eager = not torch.compiler.is_compiling()
            if is_eager and not tower.trunk.training:
                cost = inference_cost(strategy, self.size)
                if cost > 1.0:
                    warn_of_cost(strategy, cost)
        else:
            self.stages = {}
        self.counts = self._plan().counts if self.stages else ()

    def _plan(self) -> StepPlan:
        """Return the plan of the strategy for the size of the pass."""
        plan = make_plan if torch.compiler.is_compiling() else cached_plan
        return plan(self.strategy, self.size)

    @classmethod
    def begin(
        cls,
        reduction: Reduction,
        i: int,
        tokens: Tensor,
        mask: Tensor | None,
        text_cls: Tensor | None,
        *,
        on_grid: bool,
    ) -> Self:
        """Create the state of a pass of a reduced model, whose tokens (B, N, D) enter block i."""
        tower, strategy = reduction.tower, reduction.strategy
        forward = cls(
            tower,
            strategy,
            text_cls,
            num_tokens=tokens.shape[1] if i == reduction.first else None,
            on_grid=on_grid,
            real=None if mask is None else real_tokens(mask, tokens),
        )
        if not forward.stages:
            return forward
        if on_grid and tower.pools and strategy.merge == "none":
            raise ValueError(
                "model: expected one that pools all of its patches, or none, to return the tokens "
                f"of several blocks under {strategy.name!r}, got a {type(tower.model).__name__} "
                "that pools the kept ones alone; unreduce_ it first"
            )
        if text_cls is None and reduction.image_text is not None and strategy.is_guided:
            warn_unguided()
        return forward

    def previous(self, i: int) -> StageInfo | None:
        """Return the result of the last step before block i."""
        before = [first for first in self.infos if first < i]
        return self.infos[max(before)] if before else None

    def positions(self, i: int) -> Tensor | None:
        """Return the positions of the tokens that enter block i, see `BlockStep`."""
        previous = self.previous(i)
        return None if previous is None else previous.positions

    def returns_grid(self, i: int) -> bool:
        """Return whether block i must return all tokens of block 0.

        The last block must do so if the tower pools its patches, so that each token counts by its
        size, or if the batch is padded, so that nothing after it reads padding.
        """
        return self.on_grid or (self.unmerges and i == self.tower.depth - 1)

    def replaces_block(self, i: int) -> bool:
        """Return whether the strategy runs in place of block i."""
        if i in self.stages:
            return self.strategy.replaces_block
        return self.strategy.replaces_later and any(first < i for first in self.stages)

    def enter_block(
        self, i: int, tokens: Tensor, kwargs: dict[str, Any] | None = None
    ) -> BlockStep:
        """Apply the strategy to the tokens (B, N, D) that enter block i.

        Every block of every reduced forward pass is entered here. `kwargs` are what the model
        passes to the block, if it calls it.
        """
        previous, stage = self.previous(i), self.stages.get(i)
        entering = self._entering(tokens, previous)
        if stage is not None:
            entering = self._without_padding(entering)
            return self._take_step(i, stage, entering, previous, kwargs)
        if self.replaces_block(i):
            return self._run_later_block(i, entering, previous, kwargs)
        return entering

    def _entering(self, tokens: Tensor, previous: StageInfo | None) -> BlockStep:
        """Return the tokens that enter a block, with what the last step has left of them."""
        if previous is None:
            return BlockStep(tokens)
        slots = self.slots.get(previous.stage.first)
        return BlockStep(
            slots.merged(tokens) if self.on_grid and slots is not None else tokens,
            positions=previous.positions,
            slots=slots,
            changes_mask=True,
            mask=None if self.padding is None else previous.mask,
        )

    def _without_padding(self, entering: BlockStep) -> BlockStep:
        """Return the tokens that enter the first step of a padded batch, real ones first."""
        padding, tower = self.padding, self.tower
        if padding is None or entering.changes_mask:
            return entering
        return BlockStep(
            padding.packed(entering.tokens),
            positions=padding.positions(tower.num_prefix_tokens) if tower.has_positions else None,
            slots=padding.slots,
            changes_mask=True,
            mask=padding.mask,
        )

    def _take_step(
        self,
        i: int,
        stage: Stage,
        entering: BlockStep,
        previous: StageInfo | None,
        kwargs: dict[str, Any] | None,
    ) -> BlockStep:
        """Take the step of a stage before block i, or in its place."""
        strategy, padding, keep = self.strategy, self.padding, None
        if padding is None:
            self._check_entering(i, entering.tokens)
        else:
            stage, keep = replace(stage, keep=padding.most[i]), padding.keeps[:, i]
        tower, replay = self._tower_at(i, entering, kwargs), self.infos.get(i)
        context = Context(self.text_cls, previous, replay, entering.mask, keep, self.keeps_shifts)
        tokens, info = strategy.step(tower, stage, entering.tokens, context)
        if self.keeps_shifts and not strategy.replaces_block:
            info = info._replace(shift=context.shift(entering.tokens, tokens, info.reduction))
        if padding is None:
            self._check_remaining(i, tokens)
        if tower.has_positions and isinstance(info.reduction, ReductionInfo):
            info = info._replace(positions=tower.positions_after(info.reduction))
        return BlockStep(
            tokens,
            info._replace(shift=None),
            positions=info.positions,
            replaced_block=strategy.replaces_block,
            slots=self._slots_after(info, entering.slots),
            changes_mask=True,
            mask=None if padding is None else info.mask,
        )

    def _run_later_block(
        self,
        i: int,
        entering: BlockStep,
        previous: StageInfo | None,
        kwargs: dict[str, Any] | None,
    ) -> BlockStep:
        """Run block i, which has no step, as the strategy runs the blocks after its steps."""
        tower = self._tower_at(i, entering, kwargs)
        tokens = self.strategy.run_later_block(tower, i, entering.tokens, previous)
        return entering._replace(tokens=tokens, replaced_block=True, changes_mask=True)

    def _tower_at(self, i: int, entering: BlockStep, kwargs: dict[str, Any] | None) -> Tower:
        """Return the tower at the positions of the tokens that enter block i."""
        tower = self.tower
        if kwargs and tower.has_positions:
            tower = tower.from_block_kwargs(i, kwargs)
        positions = entering.positions
        return tower if positions is None else tower.with_positions(positions)

    def _slots_after(self, info: StageInfo, slots: Slots | None) -> Slots | None:
        """Return where the tokens of block 0 are after a step, if a block must return them."""
        if not (self.on_grid or self.unmerges):
            return slots
        return slots_after(slots, info.reduction, info.shift)

    def _check_entering(self, i: int, tokens: Tensor) -> None:
        expected = self.counts[i]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"images: expected {expected} tokens before block {i}, those of images "
                f"{self.tower.image_size}, got {tokens.shape[1]}; resize the images"
            )

    def _check_remaining(self, i: int, tokens: Tensor) -> None:
        """Check the token count that FLOPs, `at_flops` and `at_keep` are computed from."""
        expected = self.counts[i + 1]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"strategy: expected {self.strategy.name!r} to leave {expected} tokens at block "
                f"{i}, the count in its token_counts, got {tokens.shape[1]} from its step"
            )

    def store(self, i: int, step: BlockStep) -> BlockStep:
        """Store the result of entering block i; return it with slots only if the block needs them.

        A pass that runs again finds the result, and replays it.
        """
        if step.info is not None:
            self.add(i, step.info, step.slots)
        slots, tower = step.slots if self.returns_grid(i) else None, self.tower
        if slots is not None and tower.pools and i == tower.depth - 1 and not tower.needs_grid:
            slots = slots._replace(shift=None)  # each token counts by its size
        return step._replace(slots=slots)

    def add(self, i: int, info: StageInfo, slots: Slots | None = None) -> None:
        """Add the result of the step at block i, and where the tokens of block 0 are after it."""
        self.infos[i], self.slots[i] = info, slots

    def run_block(
        self, i: int, tokens: Tensor, *, cls_only: bool = False
    ) -> tuple[Tensor, StageInfo | None]:
        """Run block i under the strategy, outside the model's own forward.

        Args:
            i: the block.
            tokens: (B, N, D), the tokens that enter it.
            cls_only: return token 0 alone, (B, 1, D), unless the strategy replaces the block.

        Returns:
            The tokens after the block, and the result of the step before or in it.
        """

        def run_in_place(tokens: Tensor) -> tuple[Tensor, StageInfo | None]:
            step = self.enter_block(i, tokens)
            return step.tokens, step.info

        if self.replaces_block(i):
            return self.tower.in_block(i, run_in_place, tokens)
        step = self.enter_block(i, tokens)
        tower = self.tower if step.positions is None else self.tower.with_positions(step.positions)
        if cls_only:
            return tower.cls_block(i, step.tokens, step.tokens[:, 0])[:, None], step.info
        return tower.block(i, step.tokens), step.info
