"""Padded batches under strategies that take no mask: images of the same size are reduced together.

    group: the images of n patches, without their padding; its step is that of these images alone
    rows of an image: [prefix, kept, padding, merged]; merged only if a group has such a token

A step runs once for each number of patches in the batch. Between steps the batch is one tensor.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from elip_kernels import BipartiteInfo, ReductionInfo
from elip_models.reduction.schedule import Stage
from elip_models.reduction.strategy import Context, StageInfo, Strategy
from elip_models.towers import Tower
from elip_models.towers.tower_parts import NO_POSITION


class Group(NamedTuple):
    """The images of a batch that have the same number of patches.

    images: (G,) their indices in the batch.
    columns: (T,) the indices of their tokens among the N of the batch.
    stages: those of one of the images alone, by first block.
    info: the last result of their steps, or None.
    """

    images: Tensor
    columns: Tensor
    stages: dict[int, Stage]
    info: StageInfo | None = None

    def take(self, batch: Tensor) -> Tensor:
        """Return the tokens (G, T, ..) of the images, of those of a batch (B, N, ..)."""
        return batch[self.images[:, None], self.columns]


def enter_in_groups(
    strategy: Strategy,
    tower: Tower,
    i: int,
    tokens: Tensor,
    context: Context,
    groups: tuple[Group, ...],
) -> tuple[Tensor, StageInfo | None]:
    """Apply the strategy to each group of the tokens (B, N, D) that enter block i, or run it.

    The result is None if no group has a step there.
    """
    has_step = any(i in group.stages for group in groups)
    replaces_block = strategy.replaces_block if has_step else strategy.replaces_later
    replays = groups if context.replay is None else context.replay.groups
    left, infos = [], []
    for group, replay in zip(groups, replays, strict=True):
        own, tower_at, info = group.take(tokens), _tower_of(tower, group), None
        if i in group.stages:
            text = context.text_cls
            text = text if text is None or text.shape[0] == 1 else text[group.images]
            replayed = None if context.replay is None else replay.info
            alone = Context(text, group.info, replayed)
            own, info = strategy.step(tower_at, group.stages[i], own, alone)
        elif replaces_block and strategy.replaces_later and group.info is not None:
            own = strategy.run_later_block(tower_at, i, own, group.info)
        elif replaces_block:
            own = tower_at.run_sublayers(i, own)
        left.append(own)
        infos.append(info)
    if has_step:
        return _joined(left, infos, groups, tower, tokens.shape[1])
    return _spread(left, groups, tokens.shape[1]), None


def _tower_of(tower: Tower, group: Group) -> Tower:
    """Return the tower at the positions of a group's tokens."""
    if not tower.has_positions:
        return tower
    return tower.select_images(group.images).with_positions(_positions_of(tower, group))


def _positions_of(tower: Tower, group: Group) -> Tensor:
    """Return the positions (G, T-p) of a group's patches; `tower` is at those of the batch."""
    p = tower.num_prefix_tokens
    return group._replace(columns=group.columns[p:] - p).take(tower.positions)


def _joined(
    left: list[Tensor],
    infos: list[StageInfo | None],
    groups: tuple[Group, ...],
    tower: Tower,
    N: int,
) -> tuple[Tensor, StageInfo]:
    """Return the tokens and the result of the whole batch, of N tokens before the step."""
    p, like = tower.num_prefix_tokens, next(info for info in reversed(infos) if info is not None)
    results = [
        _unchanged(own, group, like, tower) if info is None else info
        for own, info, group in zip(left, infos, groups, strict=True)
    ]
    reductions = [info.reduction for info in results]
    is_merged = [getattr(reduction, "merged", False) for reduction in reductions]
    K = max(r.num_rows - merged for r, merged in zip(reductions, is_merged, strict=True)) - p
    R, after = p + K + any(is_merged), []
    for group, info, result in zip(groups, infos, results, strict=True):
        rows = torch.arange(result.reduction.num_rows, device=group.images.device)
        if getattr(result.reduction, "merged", False):
            rows[-1] = R - 1
        after.append(group._replace(columns=rows, info=info or group.info))
    mask = _spread([_mask_of(info) for info in results], after, R)
    slots = _spread([r.slots for r in reductions], groups, N, fill=R - 1)
    if isinstance(like.reduction, BipartiteInfo):
        reduction = BipartiteInfo(slots, R, mask)
    else:
        reduction = _joined_reduction(reductions, groups, K, N, mask, slots)
    joined = {
        "attention": _spread([info.attention for info in results], groups, N),
        "sizes": _spread([info.sizes for info in results], after, R),
    }
    if tower.has_positions and like.positions is not None:
        patches = [group._replace(columns=group.columns[p:] - p) for group in after]
        positions = [info.positions for info in results]
        joined["positions"] = _spread(positions, patches, R - p, fill=NO_POSITION)
    stage = replace(like.stage, keep=K)
    return _spread(left, after, R), StageInfo(stage, reduction, groups=tuple(after), **joined)


def _joined_reduction(
    reductions: list[ReductionInfo],
    groups: tuple[Group, ...],
    K: int,
    N: int,
    mask: Tensor,
    slots: Tensor | None,
) -> ReductionInfo:
    """Return the reduction of the batch, with K kept tokens; padding fills up those of an image."""
    p, device = reductions[0].num_prefix_tokens, mask.device
    weights = _spread([r.weights for r in reductions], groups, N)
    rows = [
        group._replace(columns=torch.arange(r.kept.shape[1], device=device))
        for group, r in zip(groups, reductions, strict=True)
    ]
    kept = [group.columns[r.kept] for group, r in zip(groups, reductions, strict=True)]
    kept = _spread(kept, rows, K, fill=N)
    is_kept = torch.zeros(len(mask), N + 1, dtype=torch.bool, device=device)
    is_kept = is_kept.scatter(1, kept, True)[:, :N]
    is_kept[:, :p] = True
    others = is_kept.to(torch.uint8).argsort(dim=1, stable=True)
    rank = (kept == N).cumsum(1) - 1
    kept = torch.where(kept == N, others.gather(1, rank.clamp(min=0)), kept)
    merged = any(r.merged for r in reductions)
    return ReductionInfo(kept, weights, mask, p, merged, slots)


def _unchanged(tokens: Tensor, group: Group, like: StageInfo, tower: Tower) -> StageInfo:
    """Return the result of no step, in the form of that of another group."""
    shape, p = tokens.shape[:2], tower.num_prefix_tokens
    G, N = shape
    index = torch.arange(N, device=tokens.device).expand(G, -1)
    has_slots, reduction = like.reduction.slots is not None, BipartiteInfo(index.int(), N)
    if isinstance(like.reduction, ReductionInfo):
        weights = like.reduction.weights.new_zeros(shape)
        slots = index.int() if has_slots else None
        reduction = ReductionInfo(index[:, p:], weights, None, p, merged=False, slots=slots)
    sizes = None
    if like.sizes is not None:
        sizes = like.sizes.new_ones(shape) if group.info is None else group.info.sizes
    positions = None if like.positions is None else _positions_of(tower, group)
    return StageInfo(like.stage, reduction, sizes=sizes, positions=positions)


def _mask_of(info: StageInfo) -> Tensor:
    """Return which rows (G, T) of a group are real after its step."""
    if info.mask is not None:
        return info.mask
    reduction = info.reduction
    like = reduction.slots if isinstance(reduction, BipartiteInfo) else reduction.weights
    return torch.ones(len(like), reduction.num_rows, dtype=torch.bool, device=like.device)


def _spread(
    values: list[Tensor | None], groups: Sequence[Group], length: int, fill: int = 0
) -> Tensor | None:
    """Return the values (G, T, ..) of each group at its place in a batch (B, `length`, ..).

    None is `fill`; the result is None if all are.
    """
    B = sum(len(group.images) for group in groups)
    first = next((value for value in values if value is not None), None)
    if first is None:
        return None
    batch = first.new_full((B, length, *first.shape[2:]), fill)
    for value, group in zip(values, groups, strict=True):
        if value is not None:
            batch[group.images[:, None], group.columns] = value
    return batch
