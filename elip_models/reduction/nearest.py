"""merge='nearest': merge each dropped token into the kept one with the most similar key.

    k     = head mean of the keys of the block that follows, without gradient
    x_i   = mean of the tokens merged into i, weighted by sizes           elip_kernels.merge_nearest

The number of tokens is the same as with merge='none', and every patch is part of one of them. Later
blocks receive the sizes.
"""

from torch import Tensor

import elip_kernels
from elip_models.reduction.schedule import Stage
from elip_models.reduction.strategy import Context, StageInfo
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
    """Keep tokens, and merge each of the others into the most similar one.

    Args:
        tower: the tower.
        stage: the stage whose step this is.
        tokens: (B, N, D).
        row: (B, N) the scores that select.
        context: the other inputs of the step.
        kept: (B, K), see `elip_kernels.merge_nearest`; None: the `stage.keep` largest of `row`.
        metric: (B, N, C) the features to compare, if the block has already computed its keys.

    Returns:
        The tokens (B, p+K, D), and the `StageInfo`.
    """
    p = tower.num_prefix_tokens
    sizes = None if context.previous is None else context.previous.sizes
    if context.replay is not None:
        reduction = context.replay.reduction
        tokens, sizes = elip_kernels.apply_merge(tokens, reduction, size=sizes)
        return tokens, StageInfo(stage, reduction, row, sizes)
    if kept is None:
        kept = elip_kernels.select_tokens(row, stage.keep, num_prefix_tokens=p)
    if metric is None:
        metric = tower.mean_keys(stage.first, tokens)
    tokens, sizes, reduction = elip_kernels.merge_nearest(
        tokens, kept, metric, size=sizes, num_prefix_tokens=p, return_info=True
    )
    return tokens, StageInfo(stage, reduction, row, sizes)


def nearest_flops(size: TowerSize, tokens: int, keep: int) -> int:
    """Return the FLOPs of the comparison for one image, without those of its keys."""
    return 2 * tokens * keep * (size.width // size.heads)
