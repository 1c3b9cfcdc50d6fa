"""Every public op as inputs and a call, as models use it, for reports and checks.

B equal images of N tokens and width D, of which K are kept, with H heads; values from N(0, 1).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import elip_kernels

Call = Callable[[int, int, int, int, int, torch.dtype], None]
Outputs = tuple[Tensor, ...]

# (N, K) of images of 224/16, 224/14 and 336/14 when 65% of the patches stay.
REAL_CASES = ((197, 127), (257, 166), (577, 374))
BATCHES = (2, 128)  # small and large batches may use different kernels


class Op(NamedTuple):
    """An op as a function of tensors.

    Attributes:
        inputs: (B, N, D, K, H, dtype) -> tensors on the CPU.
        run: (K, H, *inputs) -> the outputs, and last the gradient of the tokens if there is one.
    """

    inputs: Callable[[int, int, int, int, int, torch.dtype], Outputs]
    run: Callable[..., Outputs]


def _tokens(B: int, N: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(N, D).to(dtype).repeat(B, 1, 1)


def _with_gradient(leaf: Tensor, out: Tensor, *others: Tensor) -> Outputs:
    """Return `out`, the other outputs, and the gradient of the sum of `out`."""
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    return out.detach(), *others, gradient


def _reduce_inputs(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    return _tokens(B, N, D, dtype), torch.randn(B, N).softmax(-1)


def _reduce(K: int, H: int, tokens: Tensor, row: Tensor) -> Outputs:
    leaf = tokens.detach().requires_grad_()
    out, info = elip_kernels.reduce(leaf, row, K, return_info=True)
    return _with_gradient(leaf, out, info.kept, info.weights)


def _block_inputs(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    """Return tokens, CLS, and norm, query and key parameters of a pre-norm block."""
    cls, vectors = torch.randn(B, D), torch.randn(3, D)
    matrices = torch.randn(2, D, D) / D**0.5
    block = (cls, vectors[0], vectors[1], matrices[0], vectors[2], matrices[1])
    return _tokens(B, N, D, dtype), *(t.to(dtype) for t in block)


def _named(H: int, *block: Tensor) -> dict[str, Any]:
    names = ("norm_weight", "norm_bias", "q_weight", "q_bias", "k_weight", "v_weight", "v_bias")
    return dict(zip(names, block, strict=False)) | {"eps": 1e-6, "num_heads": H}


def _from_tokens(K: int, H: int, tokens: Tensor, cls: Tensor, *block: Tensor) -> Outputs:
    return (elip_kernels.cls_attention_from_tokens(tokens, cls, **_named(H, *block)),)


def _output_inputs(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    value = torch.randn(D, D) / D**0.5, torch.randn(D)
    return *_block_inputs(B, N, D, K, H, dtype), *(t.to(dtype) for t in value)


def _output(K: int, H: int, tokens: Tensor, cls: Tensor, *block: Tensor) -> Outputs:
    return (elip_kernels.cls_attention_output(tokens, cls, **_named(H, *block)),)


def _score_reduce(
    K: int, H: int, tokens: Tensor, cls: Tensor, *block: Tensor, row: Tensor | None = None
) -> Outputs:
    """Return out, kept, weights, row and the gradient; select by `row` if it is given."""
    leaf, options = tokens.detach().requires_grad_(), _named(H, *block) | {"row": row}
    out, info, row = elip_kernels.score_reduce(leaf, cls, K, return_info=True, **options)
    return _with_gradient(leaf, out, info.kept, info.weights, row)


def _fuse_inputs(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    return _tokens(B, N, D, dtype), torch.randn(B, D).to(dtype)


def _fuse_text(K: int, H: int, tokens: Tensor, text: Tensor) -> Outputs:
    return (elip_kernels.fuse_text(tokens, text, 0.8, "match"),)


def _row_inputs(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    q, k = torch.randn(B, H, D // H), torch.randn(H, N, D // H).repeat(B, 1, 1, 1)
    return q.to(dtype), k.to(dtype)


def _cls_attention(K: int, H: int, q: Tensor, k: Tensor) -> Outputs:
    return (elip_kernels.cls_attention(q, k),)


def _map_inputs(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    return tuple(torch.randn(H, N, D // H).to(dtype).repeat(B, 1, 1, 1) for _ in "qk")


def _attention_column_mean(K: int, H: int, q: Tensor, k: Tensor) -> Outputs:
    return (elip_kernels.attention_column_mean(q, k),)


def _merge_inputs(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    """Return tokens, metric, sizes, penalties and scores."""
    metric, size = torch.randn(B, N, D // H).to(dtype), torch.randint(1, 6, (B, N)).float()
    return _tokens(B, N, D, dtype), metric, size, torch.rand(B, N), torch.randn(B, N).to(dtype)


def _bipartite_merge(
    K: int, H: int, tokens: Tensor, metric: Tensor, size: Tensor, penalty: Tensor, scores: Tensor
) -> Outputs:
    leaf, options = tokens.detach().requires_grad_(), {"size": size, "penalty": penalty}
    r = tokens.shape[1] - K
    merged, sizes, info = elip_kernels.bipartite_merge(leaf, metric, r, **options, return_info=True)
    return _with_gradient(leaf, merged, sizes, info.slots)


def _apply_merge(
    K: int, H: int, tokens: Tensor, metric: Tensor, size: Tensor, penalty: Tensor, scores: Tensor
) -> Outputs:
    leaf, r = tokens.detach().requires_grad_(), tokens.shape[1] - K
    *_, info = elip_kernels.bipartite_merge(tokens, metric, r, return_info=True)
    merged, sizes = elip_kernels.apply_merge(leaf, info, size=size)
    return _with_gradient(leaf, merged, sizes)


def _unmerge(
    K: int, H: int, tokens: Tensor, metric: Tensor, size: Tensor, penalty: Tensor, scores: Tensor
) -> Outputs:
    B, N, _ = tokens.shape
    slots = torch.arange(N, dtype=torch.int32, device=tokens.device) % K
    leaf = tokens[:, :K].detach().requires_grad_()
    info = elip_kernels.BipartiteInfo(slots.expand(B, -1), K)
    return _with_gradient(leaf, elip_kernels.unmerge(leaf, info))


def _select_tokens(
    K: int, H: int, tokens: Tensor, metric: Tensor, size: Tensor, penalty: Tensor, scores: Tensor
) -> Outputs:
    return (elip_kernels.select_tokens(scores, K),)


def _candidates(B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> Outputs:
    """Return tokens whose cosines are exact in each dtype, and relevances that are far apart.

    The length of each token is a power of two: 4^n of its numbers are 1 or -1, the others 0.
    """
    relevance = 1.1 ** -torch.stack([torch.randperm(N) for _ in range(B)]).float()
    tokens = _tokens(B, N, D, dtype).sign()
    tokens[..., 4 ** int(math.log(D, 4)) :] = 0
    return tokens, relevance


def _select_diverse(K: int, H: int, tokens: Tensor, relevance: Tensor) -> Outputs:
    return (elip_kernels.select_diverse(tokens, K, selection_order=True),)


def _select_dpp(K: int, H: int, tokens: Tensor, relevance: Tensor) -> Outputs:
    return (elip_kernels.select_dpp(tokens, K, relevance=relevance, selection_order=True),)


def _merge_nearest(
    K: int, H: int, tokens: Tensor, metric: Tensor, size: Tensor, penalty: Tensor, scores: Tensor
) -> Outputs:
    leaf, kept = tokens.detach().requires_grad_(), elip_kernels.select_tokens(scores, K)
    merged, sizes, info = elip_kernels.merge_nearest(
        leaf, kept, metric, size=size, return_info=True
    )
    return _with_gradient(leaf, merged, sizes, info.slots)


OPS: dict[str, Op] = {
    "reduce": Op(_reduce_inputs, _reduce),
    "score_reduce": Op(_block_inputs, _score_reduce),
    "fuse_text": Op(_fuse_inputs, _fuse_text),
    "cls_attention": Op(_row_inputs, _cls_attention),
    "attention_column_mean": Op(_map_inputs, _attention_column_mean),
    "cls_attention_from_tokens": Op(_block_inputs, _from_tokens),
    "cls_attention_output": Op(_output_inputs, _output),
    "bipartite_merge": Op(_merge_inputs, _bipartite_merge),
    "merge_nearest": Op(_merge_inputs, _merge_nearest),
    "apply_merge": Op(_merge_inputs, _apply_merge),
    "select_tokens": Op(_merge_inputs, _select_tokens),
    "unmerge": Op(_merge_inputs, _unmerge),
    "select_diverse": Op(_candidates, _select_diverse),
    "select_dpp": Op(_candidates, _select_dpp),
}


def _call(op: Op, B: int, N: int, D: int, K: int, H: int, dtype: torch.dtype) -> None:
    op.run(K, H, *op.inputs(B, N, D, K, H, dtype))


# They have no kernels, or other calls launch the same ones.
_OTHERS = ("apply_merge", "fuse_text", "select_tokens", "unmerge")
CALLS: dict[str, Call] = {
    name: partial(_call, op) for name, op in OPS.items() if name not in _OTHERS
}
