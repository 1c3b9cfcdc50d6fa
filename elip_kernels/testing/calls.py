"""Every op by name, called as models call it: what reports and tests run.

A call is forward, and backward where there is one, on CPU tensors of N(0, 1): B images, all alike,
of N tokens, D wide, of which K stay; H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import elip_kernels
from elip_kernels.ops.fuse_text import fuse_text

Call = Callable[[int, int, int, int, int, torch.dtype], None]

# (N, K) of images of 224/16, 224/14 and 336/14 when 65% of the patches stay.
REAL_CASES = ((197, 127), (257, 166), (577, 374))
BATCHES = (2, 128)  # few images may take other kernels than many


def _tokens(B: int, N: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(N, D).to(dtype).repeat(B, 1, 1).requires_grad_()


def _block(D: int, H: int, dtype: torch.dtype) -> dict[str, Any]:
    """Parameters of a pre-norm block's norm, query and key."""
    matrices = {name: torch.randn(D, D).to(dtype) / D**0.5 for name in ("q_weight", "k_weight")}
    vectors = {name: torch.randn(D).to(dtype) for name in ("norm_weight", "norm_bias", "q_bias")}
    return matrices | vectors | {"eps": 1e-6, "num_heads": H}


def _reduce(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    row = torch.randn(B, N).softmax(-1)
    out = elip_kernels.reduce(_tokens(B, N, D, dtype), row, K)
    out.backward(torch.ones_like(out))


def _score_reduce(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    cls = torch.randn(B, D).to(dtype)
    out = elip_kernels.score_reduce(_tokens(B, N, D, dtype), cls, K, **_block(D, H, dtype))
    out.backward(torch.ones_like(out))


def _fuse_text(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    fuse_text(_tokens(B, N, D, dtype), torch.randn(B, D).to(dtype), 0.8, "match")


def _cls_attention(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(B, H, D // H), torch.randn(H, N, D // H).repeat(B, 1, 1, 1)
    elip_kernels.cls_attention(q.to(dtype), k.to(dtype))


def _attention_column_mean(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    q, k = (torch.randn(H, N, D // H).to(dtype).repeat(B, 1, 1, 1) for _ in range(2))
    elip_kernels.attention_column_mean(q, k)


def _from_tokens(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    tokens, cls = _tokens(B, N, D, dtype), torch.randn(B, D).to(dtype)
    elip_kernels.cls_attention_from_tokens(tokens, cls, **_block(D, H, dtype))


def _cls_attention_output(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    tokens, cls = _tokens(B, N, D, dtype), torch.randn(B, D).to(dtype)
    value = {"v_weight": torch.randn(D, D).to(dtype) / D**0.5, "v_bias": torch.randn(D).to(dtype)}
    elip_kernels.cls_attention_output(tokens, cls, **_block(D, H, dtype), **value)


def _bipartite_merge(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    metric, tokens = torch.randn(B, N, D // H).to(dtype), _tokens(B, N, D, dtype)
    options = {"size": torch.randint(1, 6, (B, N)).float(), "penalty": torch.rand(B, N)}
    merged, _ = elip_kernels.bipartite_merge(tokens, metric, N - K, **options)
    merged.backward(torch.ones_like(merged))


def _merge_nearest(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    metric, size = torch.randn(B, N, D // H).to(dtype), torch.randint(1, 6, (B, N)).float()
    kept = elip_kernels.select_tokens(torch.randn(B, N).to(dtype), K)
    merged, _ = elip_kernels.merge_nearest(_tokens(B, N, D, dtype), kept, metric, size=size)
    merged.backward(torch.ones_like(merged))


CALLS: dict[str, Call] = {
    "reduce": _reduce,
    "score_reduce": _score_reduce,
    "fuse_text": _fuse_text,
    "cls_attention": _cls_attention,
    "attention_column_mean": _attention_column_mean,
    "cls_attention_from_tokens": _from_tokens,
    "cls_attention_output": _cls_attention_output,
    "bipartite_merge": _bipartite_merge,
    "merge_nearest": _merge_nearest,
}
