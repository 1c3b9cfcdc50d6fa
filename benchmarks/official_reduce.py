"""The reduction as the official ELIP code performs it, in our own words: the baseline to time.

All scores are sorted, every image is indexed in a Python loop, the dropped tokens are weighed and
summed in a second loop, and the pieces are stacked and concatenated. Gradients reach tokens only.
"""

import torch
from torch import Tensor


def official_reduce(tokens: Tensor, attn: Tensor, keep: int) -> Tensor:
    """tokens (B, N, D), attn (B, N-1) -> (B, keep+2, D)."""
    with torch.no_grad():
        scores, order = attn.sort(dim=-1, descending=True)
        kept = order[:, :keep].sort(dim=-1).values + 1
        kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=-1)
        weights = scores[:, keep:] / (scores[:, keep:].sum(dim=-1, keepdim=True) + 1e-6)
        dropped = order[:, keep:] + 1
    merged = [
        (x[index] * weight[:, None]).sum(dim=0, keepdim=True)
        for x, index, weight in zip(tokens, dropped, weights, strict=True)
    ]
    stays = [x[index] for x, index in zip(tokens, kept, strict=True)]
    return torch.cat([torch.stack(stays), torch.stack(merged)], dim=1)


def eager_reduce(tokens: Tensor, attn: Tensor, keep: int) -> Tensor:
    """The same without a loop: topk, gather, one batched product. A good eager form."""
    with torch.no_grad():
        kept = attn.topk(keep, dim=-1).indices.sort(dim=-1).values
        weights = attn.scatter(1, kept, 0.0)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
        index = (kept + 1)[..., None].expand(-1, -1, tokens.shape[2])
    merged = torch.bmm(weights[:, None], tokens[:, 1:])
    return torch.cat([tokens[:, :1], tokens.gather(1, index), merged], dim=1)
