"""One step through one block: the engine of every strategy.

    tokens, info = step(tokens)      where the strategy acts, before the block or in its place
    tokens = block(tokens)           unless the step took its place

All that one forward knows is in its `Forward`: who runs a tower makes one, and takes it through the
blocks in order. `encode_image`, the blocks that `reduce_` changes, pictures and benchmarks do so.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from elip_models.reduction.strategy import (
    Context,
    StageInfo,
    Strategy,
    stages_of,
    tokens_entering,
    warn_if_slower,
)
from elip_models.reduction.token_assignment import Slots, slots_of
from elip_models.towers import Tower


class Step(NamedTuple):
    """What a step leaves.

    tokens: before the block, or after it where `replaced_block`.
    info: what the strategy did, None where it did nothing.
    positions: (B, N-p) where the tokens stand, if the tower reads it and some have left.
    slots: where the tokens of block 0 are now, if the forward keeps it and some have left.
    """

    tokens: Tensor
    info: StageInfo | None = None
    positions: Tensor | None = None
    replaced_block: bool = False
    slots: Slots | None = None


class Forward:
    """One forward of a tower under a strategy.

    infos: what each step did, by block. A block whose info is there does the same again, so that
        what is recomputed in backward does not choose anew. Nothing here is changed by a step: who
        runs the blocks notes what each did.
    slots: behind each step, see `Step`, where the forward or its last block is to leave a grid.
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
        rows: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Args:
        tower: of the blocks.
        strategy: for this tower, see `Strategy.fitted`.
        text_cls: (B, D), the guidance, detached, or None.
        num_tokens: that enter block 0; None: those of an image of the tower's own size.
        on_grid: blocks take and leave all tokens of block 0, each as the one that it went into.
        replays: what each step did for the same images elsewhere, and does here again.
        rows: what selects in place of a scorer, (B, N) over the tokens of block 0, by the block
            that a step stands before.
        """
        self.tower, self.strategy, self.text_cls = tower, strategy, text_cls
        self.size = tower.size
        if tower.has_dynamic_size and num_tokens is not None:
            if isinstance(num_tokens, Tensor):  # of torch.jit.trace
                num_tokens = int(num_tokens)
            self.size = tower.size._replace(num_patches=num_tokens - tower.num_prefix_tokens)
        self.on_grid, self.unmerges = on_grid, (tower.pools and strategy.merge) or strategy.pads
        self.rows = rows or {}
        self.infos = {info.stage.first: info for info in replays or ()}
        self.slots: dict[int, Slots | None] = {}
        if replays is not None:
            self.stages = {i: info.stage for i, info in self.infos.items()}
        elif strategy.reduces(text_cls, tower.model.training):
            self.stages = stages_of(strategy, self.size)
            if not self.rows:
                warn_if_slower(tower, strategy, self.size)
        else:
            self.stages = {}

    def previous(self, i: int) -> StageInfo | None:
        """What the last step before block i did."""
        before = [first for first in self.infos if first < i]
        return self.infos[max(before)] if before else None

    def positions(self, i: int) -> Tensor | None:
        """Where the tokens stand that enter block i, see `Step`."""
        previous = self.previous(i)
        return None if previous is None else previous.positions

    def leaves_grid(self, i: int) -> bool:
        """All tokens of block 0 are to leave block i: of a tower that pools its patches, the last
        one, so that each token counts by how many it holds; under a strategy that pads too, so that
        nobody behind it reads padding.
        """
        return self.on_grid or (self.unmerges and i == self.tower.depth - 1)

    def row(self, i: int) -> Tensor | None:
        """What selects before block i in place of a scorer: a token's share of a row is that of all
        that it holds.
        """
        row = self.rows.get(i)
        if row is None:
            return None
        for first, info in self.infos.items():
            if first < i:
                row = (info.reduction.source_map().to(row.dtype) @ row[..., None])[..., 0]
        return row

    def takes_place_of(self, i: int) -> bool:
        """A step runs in place of block i."""
        if i in self.stages:
            return self.strategy.replaces_block
        return self.strategy.replaces_later and any(first < i for first in self.stages)

    def step(self, i: int, tokens: Tensor) -> Step:
        """What the strategy makes of the tokens (B, N, D) that enter block i.

        Every block of every reduced forward passes here.
        """
        strategy, previous, stage = self.strategy, self.previous(i), self.stages.get(i)
        positions = None if previous is None else previous.positions
        slots = None if previous is None else self.slots.get(previous.stage.first)
        if self.on_grid and slots is not None:
            tokens = slots.merged(tokens)
        tower = self.tower if positions is None else self.tower.at(positions)
        if stage is None:
            takes_place = self.takes_place_of(i)
            if takes_place:
                tokens = strategy.later(tower, i, tokens, previous)
            return Step(tokens, None, positions, takes_place, slots)
        self._check(i, tokens)
        context = Context(self.text_cls, previous, self.infos.get(i), self.row(i))
        tokens, info = strategy.step(tower, stage, tokens, context)
        self._check_left(i, tokens)
        info = info._replace(positions=tower.positions_after(info.reduction))
        if self.on_grid or self.unmerges:
            slots = slots.after(info.reduction) if slots is not None else slots_of(info.reduction)
        return Step(tokens, info, info.positions, strategy.replaces_block, slots)

    def _check(self, i: int, tokens: Tensor) -> None:
        expected = tokens_entering(self.strategy, self.size)[i]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"images: expected {expected} tokens before block {i}, those of images "
                f"{self.tower.image_size}, got {tokens.shape[1]}; resize the images"
            )

    def _check_left(self, i: int, tokens: Tensor) -> None:
        """Else FLOPs, and what `at_flops` and `at_keep` find, would be another strategy's."""
        expected = tokens_entering(self.strategy, self.size)[i + 1]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"strategy: expected {self.strategy.name!r} to leave {expected} tokens at block "
                f"{i}, as its token_counts says, got {tokens.shape[1]} from its step"
            )

    def block(
        self, i: int, tokens: Tensor, *, cls_only: bool = False
    ) -> tuple[Tensor, StageInfo | None]:
        """Block i, reduced or not, outside the model's own forward -> tokens, and what a step did.

        cls_only: token 0 alone leaves, (B, 1, D), where no step takes the block's place.
        """
        if self.takes_place_of(i):
            return self.tower.in_block(i, lambda tokens: self.step(i, tokens)[:2], tokens)
        tokens, info, positions, *_ = self.step(i, tokens)
        tower = self.tower if positions is None else self.tower.at(positions)
        if cls_only:
            return tower.cls_block(i, tokens, tokens[:, 0])[:, None], info
        return tower.block(i, tokens), info
