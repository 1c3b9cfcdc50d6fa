"""What the absorbed forms need of a block, made from the CLS token alone: checks, and the query u.

u_h = gamma * (W_k,h^T q_h) * scale,  q = W_q LN(cls) + b_q;  the score of a token is u_h . z_n
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels._validate import check_device, check_heads, check_shape, check_tensor, message


def check_absorbed(
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
    return check_scale(scale, width // num_heads)


def check_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or head_dim ** -0.5 for None."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(message("scale", "a float or None", scale))
    return float(scale)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def absorbed_query(
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
    (B, D), dtype = cls.shape, accumulator(cls.dtype)
    gamma, beta, q_bias = [None if t is None else t.to(dtype) for t in (*norm.values(), q_bias)]
    normed = F.layer_norm(cls.to(dtype), (D,), gamma, beta, eps)
    query = F.linear(normed, q_weight.to(dtype), q_bias)
    query = query.view(B, num_heads, q_weight.shape[0] // num_heads)
    key = k_weight.to(dtype).view(num_heads, -1, D)
    absorbed = torch.einsum("bhd,hdc->bhc", query * scale, key)
    return (absorbed if gamma is None else absorbed * gamma).contiguous()


def absorbed_operands(
    tokens: Tensor, cls: Tensor, query: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """u centred, as query + rest in the dtype of `tokens` (no rest for fp32), and CLS's scores."""
    normed = F.layer_norm(cls.to(query.dtype), cls.shape[1:], eps=eps)
    cls_score = torch.bmm(query, normed[..., None])[..., 0].contiguous()
    centred = query - query.mean(-1, keepdim=True)
    if tokens.dtype == torch.float32:
        return centred, None, cls_score
    rounded = centred.to(tokens.dtype)
    return rounded, (centred - rounded.float()).to(tokens.dtype), cls_score
