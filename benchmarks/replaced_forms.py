"""The forms that ops replace, in plain PyTorch: CLS attention, its output, and the reduction.

official: LayerNorm, the whole qkv projection and the whole N x N attention map; the reduction sorts
all scores, indexes every image in a Python loop, sums the dropped tokens in a second loop, and
concatenates the results, as the official ELIP code does. Only tokens have a gradient.
eager: LayerNorm, the projections that the CLS query needs, and its row only.
tokens (B, N, D) are the block's input, cls (B, D) replaces row 0, p are the block's parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import HEADS

EPS = 1e-6

Parameters = dict[str, Tensor]


def parameters(D: int, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Return seeded parameters of LayerNorm and qkv, under the names of the absorbed ops."""
    generator = torch.Generator().manual_seed(0)
    p = {f"{n}_weight": torch.randn(D, D, generator=generator) * D**-0.5 for n in "qkv"}
    p |= {f"{n}_bias": torch.randn(D, generator=generator) * 0.1 for n in ("norm", *"qkv")}
    p["norm_weight"] = 1.0 + torch.randn(D, generator=generator) * 0.1
    return {name: value.to(device, dtype) for name, value in p.items()}


def official_row(tokens: Tensor, cls: Tensor, p: Parameters) -> Tensor:
    """Compute the head mean of the CLS row, (B, N)."""
    return _official_map(tokens, cls, p)[0][:, :, 0].mean(1)


def official_output(tokens: Tensor, cls: Tensor, p: Parameters) -> Tensor:
    """Compute the CLS token's attention output before the output projection, (B, D)."""
    attention, v = _official_map(tokens, cls, p)
    return (attention @ v).transpose(1, 2).flatten(2)[:, 0]


def eager_row(tokens: Tensor, cls: Tensor, p: Parameters) -> Tensor:
    """Compute the same as `official_row`."""
    normed = _normed(tokens, cls, p)
    return attention_row(_project(normed[:, :1], "q", p)[:, :, 0], _project(normed, "k", p))


def eager_output(tokens: Tensor, cls: Tensor, p: Parameters) -> Tensor:
    """Compute the same as `official_output`."""
    normed = _normed(tokens, cls, p)
    q, k, v = _project(normed[:, :1], "q", p), _project(normed, "k", p), _project(normed, "v", p)
    return F.scaled_dot_product_attention(q, k, v).flatten(1)


def attention_row(q: Tensor, k: Tensor) -> Tensor:
    """Compute the head mean of the softmax row: q (B, H, d), k (B, H, N, d) -> (B, N)."""
    scores = torch.matmul(k, q[..., None])[..., 0] * q.shape[2] ** -0.5
    return scores.softmax(-1).mean(1)


def column_means(q: Tensor, k: Tensor) -> Tensor:
    """Compute the mean attention each key receives: q (B, H, M, d), k (B, H, N, d) -> (B, N)."""
    return (torch.matmul(q, k.mT) * q.shape[3] ** -0.5).softmax(-1).mean((1, 2))


def _normed(tokens: Tensor, cls: Tensor, p: Parameters) -> Tensor:
    tokens = torch.cat([cls[:, None], tokens[:, 1:]], dim=1)
    return F.layer_norm(tokens, tokens.shape[2:], p["norm_weight"], p["norm_bias"], EPS)


def _project(x: Tensor, name: str, p: Parameters) -> Tensor:
    """Project and split into heads: (B, N, D) -> (B, H, N, d)."""
    projected = F.linear(x, p[f"{name}_weight"], p[f"{name}_bias"])
    return projected.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _official_map(tokens: Tensor, cls: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """Return the softmax map (B, H, N, N) and the values (B, H, N, d)."""
    weight, bias = (torch.cat([p[f"{n}_{kind}"] for n in "qkv"]) for kind in ("weight", "bias"))
    qkv = F.linear(_normed(tokens, cls, p), weight, bias).unflatten(-1, (3, HEADS, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return torch.matmul(q * q.shape[-1] ** -0.5, k.mT).softmax(-1), v


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
