"""The attention rows of a tower whose key projection cannot fold into the query, and CLS alone.

    a = mean_h softmax_n(q_h(norm(t)) . k_h(norm(x_n)))             t (B, D), a (B, N)

`Tower.score_reduce` computes the row of the others in one op.
"""

import torch
from torch import Tensor

import elip_kernels
from elip_kernels.ops.gather_ops import accumulator
from elip_models.towers.positions import PositionedTower
from elip_models.towers.tower_data import QKV
from elip_models.towers.tower_parts import normed


class AttentionRows(PositionedTower):
    """The part of a tower that computes attention rows, and takes the CLS token alone."""

    def attention_map(self, i: int, tokens: Tensor, *, qkv: QKV | None = None) -> Tensor:
        """Return block i's attention weights (B, H, N, N), as the official code computes them."""
        q, k, _ = self.qkv(i, tokens) if qkv is None else qkv
        scores, bias = torch.matmul(q * self.scale, k.mT), self.position_bias(i)
        return (scores if bias is None else scores + bias).softmax(-1)

    def cls_attention(
        self, i: int, tokens: Tensor, cls: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return block i's CLS attention row (B, N), averaged over heads.

        Args:
            i: the block.
            tokens: (B, N, D).
            cls: (B, D), used in place of token 0; without CLS the query alone.
            mask: (B, N) bool, False for padding.
        """
        with self.unsharded(i, tokens, cls) as (tokens, cls):
            arguments = self.absorbed(i) if mask is None else None
            if arguments is not None:
                return elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
            q, k = self.query_and_keys(i, tokens, cls)
            bias = self.position_bias(i) if self.has_cls else None
            if bias is not None:
                return attention_row(q, k, self.scale, bias[:, :, 0], mask)
            return elip_kernels.cls_attention(q, k.to(q.dtype), scale=self.scale, mask=mask)

    def query_and_keys(self, i: int, tokens: Tensor, cls: Tensor) -> tuple[Tensor, Tensor]:
        """Return block i's query (B, H, d) of `cls`, and the keys (B, H, N, d) that it scores."""
        parts, weights = self.projections(i), self.weights(i)
        x = with_cls(tokens, cls) if self.has_cls else tokens
        if weights is None:
            q, k, _ = self.qkv(i, x)
            q = q if self.has_cls else self.at_no_position().qkv(i, cls[:, None])[0]
            return q[:, :, 0], k
        x = parts.norm(x)
        q = x[:, :1] if self.has_cls else parts.norm(cls[:, None])
        projected = (project(y) for project, y in zip(weights, (q, x), strict=False))
        q, k = (y.unflatten(2, (parts.num_heads, -1)).transpose(1, 2) for y in projected)
        return normed(parts.q_norm, q)[:, :, 0], self.rotated(i, normed(parts.k_norm, k))

    def cls_block(self, i: int, tokens: Tensor, cls: Tensor) -> Tensor:
        """Run `cls` (B, D) alone through block i, attending to `tokens`; returns (B, D)."""
        with self.unsharded(i, tokens, cls) as (tokens, cls):
            arguments = self.absorbed(i, values=True)
            if arguments is None:
                q, k, v = self.qkv(i, with_cls(tokens, cls))
                out = self.attend(i, cls[:, None], qkv=(q[:, :, :1], k, v))
            else:
                attended = elip_kernels.cls_attention_output(tokens, cls, **arguments)
                out = cls[:, None] + self.project(i, attended[:, None])
            return self.mlp(i, out)[:, 0]


def attention_row(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return one attention row (B, N), averaged over heads, with its gradient.

    Args:
        q: (B, H, d), the query.
        k: (B, H, N, d), the keys.
        scale: factor of the scores.
        bias: (B, H, N), added to the scores.
        mask: (B, N) bool, False for padding.
    """
    scores = ((q[:, :, None] * scale) @ k.mT)[:, :, 0]
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return scores.softmax(-1, dtype=accumulator(q)).mean(1)


def with_cls(tokens: Tensor, cls: Tensor) -> Tensor:
    """Return `tokens` (B, N, D) with `cls` (B, D) in place of token 0."""
    return torch.cat([cls[:, None], tokens[:, 1:]], dim=1)
