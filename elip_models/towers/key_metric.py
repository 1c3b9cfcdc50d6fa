"""What tokens are compared by: a block's keys, averaged over its heads.

k_n = mean_h(W_h) norm(x_n) + mean_h(b_h)         one product of D x d
k_n = mean_h(turn(norm_k(W_h norm(x_n) + b_h)))   with a norm of each key, or rotary positions
"""

import torch.nn.functional as F
from torch import Tensor

from elip_models.towers.base import IDENTITY, Tower
from elip_models.towers.scoring_context import scoring_context


def mean_keys(tower: Tower, i: int, tokens: Tensor) -> Tensor:
    """The head mean (B, N, d) of block i's keys of `tokens` (B, N, D), without gradient."""
    with scoring_context(tower.model, tokens), tower.unsharded(i, tokens) as (tokens,):
        parts, weights = tower.projections(i), tower.weights(i)
        if weights is None:
            return tower.qkv(i, tokens)[1].mean(1)
        tokens, key, heads = parts.norm(tokens), weights[1], parts.num_heads
        if tower.averages_keys:
            each = (None if map is None else map.unflatten(0, (heads, -1)).mean(0) for map in key)
            return F.linear(tokens, *each)
        keys = key(tokens).unflatten(2, (heads, -1)).transpose(1, 2)
        return tower.turned(i, (parts.k_norm or IDENTITY)(keys)).mean(1)
