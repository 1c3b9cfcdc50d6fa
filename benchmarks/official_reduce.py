"""The algorithm of the official ELIP code, reimplemented as the baseline for timing.

It sorts all scores, indexes every image in a Python loop, sums the dropped tokens in a second loop,
and concatenates the results. Only tokens have a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def official_reduce(tokens: Tensor, attn: Tensor, keep: int) -> Tensor:
    """Reduce tokens (B, N, D) by scores attn (B, N-1) -> (B, keep+2, D)."""
    with torch.no_grad():
        scores, order = attn.sort(dim=-1, descending=True)
        kept = order[:, :keep].sort(dim=-1).values + 1
        kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=-1)
        weights = scores[:, keep:] / (scores[:, keep:].sum(dim=-1, keepdim=True) + 1e-6)
        dropped = order[:, keep:] + 1
    merged = [
        (x[index] * weight[:, None]).sum(dim=0, keepdim=True).to(x.dtype)
        for x, index, weight in zip(tokens, dropped, weights, strict=True)
    ]
    stays = [x[index] for x, index in zip(tokens, kept, strict=True)]
    return torch.cat([torch.stack(stays), torch.stack(merged)], dim=1)


def eager_reduce(tokens: Tensor, attn: Tensor, keep: int) -> Tensor:
    """Reduce without a loop: topk, index_select and one batched product."""
    B, N, D = tokens.shape
    with torch.no_grad():
        kept = attn.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values
        weights = attn.scatter(1, kept, 0.0)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
        first = N * torch.arange(B, device=tokens.device)[:, None]
        rows = (F.pad(kept + 1, (1, 0)) + first).flatten()
    stays = tokens.flatten(0, 1).index_select(0, rows).view(B, keep + 1, D)
    merged = torch.bmm(weights[:, None].to(tokens.dtype), tokens[:, 1:])
    return torch.cat([stays, merged], dim=1)
