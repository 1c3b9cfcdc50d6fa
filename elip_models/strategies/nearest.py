"""merge='nearest': merge each dropped token into the kept one with the most similar key.

    k     = head mean of the keys of the block that follows, without gradient
    x_i   = mean of the tokens merged into i, weighted by sizes           elip_kernels.merge_nearest

The number of tokens is the same as with merge='none', and every patch is part of one of them. Later
blocks receive the sizes.
"""

from torch import Tensor

import elip_kernels
from elip_models.strategies.schedule import Stage
from elip_models.strategies.strategy import Context, StageInfo
from elip_models.towers import Tower, TowerSize


def merge_nearest(
    tower: Tower,
    stage: Stage,
    tokens: Tensor,
    row: Tensor,
    context: Context,
    *,
    kept: Tensor | None = None,
    metric: Tensor | None = None,
) -> tuple[Tensor, StageInfo]:
    """Keep tokens by the scores `row` (B, N), and merge each other one into the most similar kept.

    It returns tokens (B, p+K, D) and the `StageInfo`. `kept` (B, K) replaces the choice by `row`.
    `metric` (B, N, C) has the features to compare, if the block has already computed its keys.
    """
    p = tower.num_prefix_tokens
    sizes = None if context.previous is None else context.previous.sizes
    if context.replay is not None:
        reduction = context.replay.reduction
        merged, sizes = elip_kernels.apply_merge(tokens, reduction, size=sizes)
    else:
        if kept is None:
            kept = elip_kernels.select_tokens(row, stage.keep, num_prefix_tokens=p)
        if metric is None:
            metric = tower.mean_keys(stage.first, tokens)
        merged, sizes, reduction = elip_kernels.merge_nearest(
            tokens, kept, metric, size=sizes, num_prefix_tokens=p, return_info=True
        )
    shift = context.shift(tokens, merged, reduction)
    return merged, StageInfo(stage, reduction, row, sizes, shift=shift)


def nearest_flops(size: TowerSize, tokens: int, keep: int) -> int:
    """Return the FLOPs of the comparison for one image, without those of its keys."""
    return 2 * tokens * keep * (size.width // size.heads)
