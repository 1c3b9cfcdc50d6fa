"""The CLS row of attention, and the CLS token's attention output, without an N x N map.

    generic:   a = mean_h softmax_n(scale * q_h . k_h,n)                q (B, H, d), k (B, H, N, d)
    absorbed:  z = (x - mean) * rstd of the tokens, row 0 made from `cls`;   q = W_q LN(cls) + b_q
               u_h = gamma * (W_k,h^T q_h) * scale;   s_h(n) = u_h . z_n                  (B, H, N)
               a = mean_h softmax_n(s_h)                                                  (B, N)
    output:    o_h = W_v,h (gamma * sum_n softmax_n(s_h) z_n + beta) + b_v,h              (B, H*d)

What beta and the key bias add to s_h is the same for every n and cancels in the softmax. Neither
key nor value projection touches the N tokens: N*D*H multiply-adds instead of N*D*D. Rows are fp32
(fp64 for fp64 tokens). No gradient: a row selects, it is not trained through.
Source: ELIP, Eq. 2; the absorption is associativity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from elip_kernels._validate import (
    check_device,
    check_heads,
    check_mask,
    check_shape,
    check_tensor,
    message,
)


def cls_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Head mean of the softmax row of one query, from q and k.

    Args:
        q: (B, H, d), fp32, bf16, fp16 or fp64.
        k: (B, H, N, d), same dtype and device.
        scale: of the scores; d ** -0.5 by default.
        mask: (B, N) bool, True = may be attended to. A row without any is NaN.

    Returns:
        (B, N) fp32 (fp64 for fp64 inputs), without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    check_tensor("q", q, "(B, H, d)", 3)
    check_tensor("k", k, "(B, H, N, d)", 4)
    B, H, d = q.shape
    check_shape("k", k, (B, H, k.shape[2], d), "(B, H, N, d)")
    check_device("k", k, "q", q)
    if k.dtype != q.dtype:
        raise TypeError(message("k", f"the dtype of q, {q.dtype}", k, "cast one of them"))
    check_mask(mask, (B, k.shape[2]), "q", q)
    return _cls_attention_op(q.detach(), k.detach(), mask, _scale(scale, d))


def cls_attention_from_tokens(
    tokens: Tensor,
    cls: Tensor,
    *,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """Head mean of a pre-norm block's CLS attention row, from the tokens that enter the block.

    Args:
        tokens: (B, N, D), before the block's norm; row 0 is CLS and is replaced by `cls`.
        cls: (B, D), the (fused) CLS token, before the norm.
        norm_weight, norm_bias: (D,) of the block's LayerNorm, or None.
        eps: of the LayerNorm.
        q_weight, q_bias, k_weight: (H*d, D), (H*d,) or None, (H*d, D), as nn.Linear has them.
        num_heads: H.
        scale: of the scores; d ** -0.5 by default.

    Returns:
        (B, N) fp32 (fp64 for fp64 tokens), without gradient; column 0 is CLS.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight}
    scale = _check_absorbed(tokens, cls, eps, num_heads, scale, norm, matrices, {"q_bias": q_bias})
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        query = _absorbed_query(cls, norm, eps, q_weight, q_bias, k_weight, num_heads, scale)
        return _from_tokens_op(tokens.detach(), cls.detach(), query, eps)


def cls_attend_from_tokens(
    tokens: Tensor,
    cls: Tensor,
    *,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """The CLS token's attention output in a pre-norm block, before the output projection.

    Args:
        v_weight, v_bias: (H*d, D) and (H*d,) or None; the others as `cls_attention_from_tokens`.

    Returns:
        (B, H*d) in the dtype of `tokens`, without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight}
    biases = {"q_bias": q_bias, "v_bias": v_bias}
    scale = _check_absorbed(tokens, cls, eps, num_heads, scale, norm, matrices, biases)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        query = _absorbed_query(cls, norm, eps, q_weight, q_bias, k_weight, num_heads, scale)
        mixed = _attend_op(tokens.detach(), cls.detach(), query, eps)  # (B, H, D)
        if norm_weight is not None:
            mixed = mixed * norm_weight
        if norm_bias is not None:
            mixed = mixed + norm_bias
        value = v_weight.to(mixed.dtype).view(num_heads, -1, tokens.shape[2])
        out = torch.einsum("bhc,hdc->bhd", mixed, value).flatten(1)
        return (out if v_bias is None else out + v_bias).to(tokens.dtype)


def _check_absorbed(
    tokens: Tensor,
    cls: Tensor,
    eps: float,
    num_heads: int,
    scale: float | None,
    norm: dict[str, Tensor | None],
    matrices: dict[str, Tensor],
    biases: dict[str, Tensor | None],
) -> float:
    """Check the arguments of the absorbed forms -> scale."""
    check_tensor("tokens", tokens, "(B, N, D)", 3)
    B, _, D = tokens.shape
    check_tensor("cls", cls, "(B, D)", 2)
    check_shape("cls", cls, (B, D), "(B, D)")
    if not isinstance(eps, float) or eps < 0:
        raise TypeError(message("eps", "a float, at least 0", eps))
    check_tensor("q_weight", matrices["q_weight"], "(H*d, D)", 2)
    width = matrices["q_weight"].shape[0]
    check_heads(num_heads, width)
    expected = {name: ((width, D), "(H*d, D)") for name in matrices}
    expected |= {name: ((D,), "(D,)") for name in norm}
    expected |= {name: ((width,), "(H*d,)") for name in biases}
    for name, value in (matrices | norm | biases).items():
        if value is None and name not in matrices:
            continue
        shape, names = expected[name]
        check_tensor(name, value, names, len(shape))
        check_shape(name, value, shape, names)
    for name, value in ({"cls": cls} | matrices | norm | biases).items():
        if value is not None:
            check_device(name, value, "tokens", tokens)
    return _scale(scale, width // num_heads)


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(message("scale", "a float or None", scale))
    return float(scale)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _absorbed_query(
    cls: Tensor,
    norm: dict[str, Tensor | None],
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    """u (B, H, D) of the formula above: query, key projection and norm weight as one vector."""
    (B, D), dtype = cls.shape, _accumulator(cls.dtype)
    gamma, beta, q_bias = [None if t is None else t.to(dtype) for t in (*norm.values(), q_bias)]
    normed = F.layer_norm(cls.to(dtype), (D,), gamma, beta, eps)
    query = F.linear(normed, q_weight.to(dtype), q_bias).view(B, num_heads, -1)
    key = k_weight.to(dtype).view(num_heads, -1, D)
    absorbed = torch.einsum("bhd,hdc->bhc", query * scale, key)
    return absorbed if gamma is None else absorbed * gamma


def cls_attention_reference(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The specification of `cls_attention`."""
    dtype = _accumulator(q.dtype)
    scores = torch.matmul(k.to(dtype), q.to(dtype)[..., None])[..., 0] * scale  # (B, H, N)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return scores.softmax(-1).mean(1)


def absorbed_reference(
    tokens: Tensor, cls: Tensor, query: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification of the absorbed forms -> z (B, N, D) and the rows (B, H, N)."""
    D = tokens.shape[2]
    normed = F.layer_norm(tokens.to(query.dtype), (D,), eps=eps)
    normed[:, 0] = F.layer_norm(cls.to(query.dtype), (D,), eps=eps)
    return normed, torch.bmm(query, normed.mT).softmax(-1)


@torch.library.custom_op("elip::cls_attention", mutates_args=())
def _cls_attention_op(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return cls_attention_reference(q, k, mask, scale)


@torch.library.custom_op("elip::cls_attention_from_tokens", mutates_args=())
def _from_tokens_op(tokens: Tensor, cls: Tensor, query: Tensor, eps: float) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        return absorbed_reference(tokens, cls, query, eps)[1].mean(1)


@torch.library.custom_op("elip::cls_attend_from_tokens", mutates_args=())
def _attend_op(tokens: Tensor, cls: Tensor, query: Tensor, eps: float) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        normed, rows = absorbed_reference(tokens, cls, query, eps)
        return torch.bmm(rows, normed)


@_cls_attention_op.register_fake
def _(q, k, mask, scale):
    return k.new_empty(k.shape[0], k.shape[2], dtype=_accumulator(k.dtype))


@_from_tokens_op.register_fake
def _(tokens, cls, query, eps):
    return query.new_empty(tokens.shape[:2])


@_attend_op.register_fake
def _(tokens, cls, query, eps):
    return torch.empty_like(query)


def _no_gradient(ctx, *grads: Tensor) -> tuple[None, ...]:
    return (None,) * 4


def _mark_row(ctx, inputs, output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


for _op in (_cls_attention_op, _from_tokens_op, _attend_op):
    _op.register_autograd(_no_gradient, setup_context=_mark_row)


@register_flop_formula(torch.ops.elip.cls_attention)
def _cls_attention_flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B H N d."""
    B, H, N, d = k_shape
    return 2 * B * H * N * d


@register_flop_formula(torch.ops.elip.cls_attention_from_tokens)
def _from_tokens_flops(tokens_shape, cls_shape, query_shape, *args, out_shape=None, **kw) -> int:
    """2 B H N D."""
    return 2 * tokens_shape[1] * query_shape[0] * query_shape[1] * query_shape[2]


@register_flop_formula(torch.ops.elip.cls_attend_from_tokens)
def _attend_flops(tokens_shape, cls_shape, query_shape, *args, out_shape=None, **kw) -> int:
    """4 B H N D: scores and weighted sum."""
    return 2 * _from_tokens_flops(tokens_shape, cls_shape, query_shape)
