"""Each dropped token joins the kept one whose key is most alike: `merge='nearest'`, one step.

    k     = head mean of the keys of the block that the step stands before, of the tokens as they
            enter it, without gradient
    x_i   = mean of the tokens that i holds, weighted by sizes            elip_kernels.merge_nearest

Sizes go on with the tokens. As many leave as without merging, and every patch is part of one.
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
    """The tokens that leave, (B, p+K, D), and what was done.

    Args:
        tower, stage, tokens, context: of the step.
        row: (B, N), what selects.
        kept: (B, K), see `elip_kernels.merge_nearest`; None: the `stage.keep` that `row` selects.
        metric: (B, N, C), what tokens are compared by, where the block has made its keys already.
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
    """Of what is compared, the keys aside, of one image with `tokens`."""
    return 2 * tokens * keep * (size.width // size.heads)
