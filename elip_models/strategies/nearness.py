"""A similarity of tokens that decreases with the distance between them.

    s_ab = cos(x_a, x_b) - sum of (1 - cos(w d)) / (1 - cos(w reach))     over both axes
         ~ cos(x_a, x_b) - (distance / reach)^2                           at small distances

x are the features that are compared, d the distance of a and b along an axis, in patches, and
w = pi / max(rows, columns, reach), so that s decreases over the whole grid. A merged token is at
the mean place of its patches. Up to a constant and a common factor, which change no choice, s is
the cosine of

    [x / |x|, c cos(w row), c sin(w row), c cos(w column), c sin(w column)],
    c = (1 - cos(w reach))^-1/2

so bipartite matching computes it as it is, from four more channels.
"""

import math

import torch
from torch import Tensor

from elip_kernels.ops.bipartite import unit_rows

CHANNELS = 4


def patch_places(grid: tuple[int, int], num_prefix_tokens: int, like: Tensor) -> Tensor:
    """Return the row and column (N, 2) of each token, zeros for prefix tokens, as fp32 or fp64.

    `like` gives the device, and fp64 if it is.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = (torch.arange(side, dtype=dtype, device=like.device) for side in grid)
    prefix = torch.zeros(num_prefix_tokens, 2, dtype=dtype, device=like.device)
    return torch.cat([prefix, torch.cartesian_prod(*axes)])


def with_nearness(metric: Tensor, places: Tensor, grid: tuple[int, int], reach: float) -> Tensor:
    """Return metric (B, N, C + 4), whose cosines are the similarities of tokens at `places`.

    Args:
        metric: (B, N, C), the features to compare.
        places: (B, N, 2), the row and column of each token.
        grid: the rows and columns of the image.
        reach: see `ToMe`.
    """
    w = math.pi / max(*grid, reach)
    weight = (1 - math.cos(w * reach)) ** -0.5
    unit = unit_rows(metric)
    angles = w * places
    return torch.cat(
        [unit, *(weight * f(angles).to(unit.dtype) for f in (torch.cos, torch.sin))], 2
    )
