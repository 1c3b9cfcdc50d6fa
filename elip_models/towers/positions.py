"""Position embeddings of another grid of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolated(positions: Tensor, grid: tuple[int, int], to: tuple[int, int], p: int) -> Tensor:
    """Position embeddings (p + rows * columns, D) of a grid -> of another; those of p prefix tokens
    stay.
    """
    if grid == to:
        return positions
    at_least_fp32 = torch.promote_types(positions.dtype, torch.float32)
    table = positions[p:].to(at_least_fp32).unflatten(0, grid).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=to, mode="bicubic", antialias=True, align_corners=False)
    table = table[0].flatten(1).T.to(positions.dtype)
    return torch.cat([positions[:p], table])
