"""The CLS row against the attention of a whole block."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import elip_kernels
from elip_kernels.ops.absorbed_query import QueryArguments

B, N, D, H = 2, 37, 48, 4


def block(dtype=torch.float64, affine=True, bias=True):
    """Return random arguments of a pre-norm block, by argument name."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    norm = {
        "norm_weight": random(D) if affine else None,
        "norm_bias": random(D) if affine else None,
    }
    weights = {"q_weight": random(D, D) / 7, "q_bias": random(D) if bias else None}
    return norm | weights | {"k_weight": random(D, D) / 7, "num_heads": H, "eps": 1e-6}


def attention(tokens, cls, arguments, k_bias):
    """Return the block's whole softmax map (B, H, N, N), and its normalised tokens."""
    tokens = torch.cat([cls[:, None], tokens[:, 1:]], dim=1)
    norm_weight, norm_bias = arguments["norm_weight"], arguments["norm_bias"]
    x = F.layer_norm(tokens, (D,), norm_weight, norm_bias, arguments["eps"])
    q = F.linear(x, arguments["q_weight"], arguments["q_bias"])
    k = F.linear(x, arguments["k_weight"], k_bias)
    q, k = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.mT * (D // H) ** -0.5).softmax(-1), x


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_absorbed_row_equals_the_block(affine, bias):
    tokens, cls = torch.randn(B, N, D).double(), torch.randn(B, D).double()
    arguments = block(affine=affine, bias=bias)
    k_bias = torch.randn(D).double()  # cancels
    rows, _ = attention(tokens, cls, arguments, k_bias)
    got = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    torch.testing.assert_close(got, rows[:, :, 0].mean(1), atol=1e-12, rtol=0)


def test_generic_row_equals_softmax():
    q, k = torch.randn(B, H, 12).double(), torch.randn(B, H, N, 12).double()
    mask = torch.rand(B, N) > 0.4
    scores = torch.einsum("bhd,bhnd->bhn", q, k) * 0.3
    expected = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1)
    got = elip_kernels.cls_attention(q, k, scale=0.3, mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert not got[~mask].any()


@pytest.mark.parametrize("G", [4, 2, 1])
def test_grouped_query_heads_read_one_key_head(G):
    q, k = torch.randn(B, H, 12).double(), torch.randn(B, G, N, 12).double()
    for mask in (None, torch.rand(B, N) > 0.4):
        bias = None if mask is None else mask[:, None, None].expand(B, 1, 1, N)
        rows = F.scaled_dot_product_attention(
            q[:, :, None], k, torch.eye(N).double().expand(B, G, N, N), bias, enable_gqa=True
        )
        got = elip_kernels.cls_attention(q, k, mask=mask)
        torch.testing.assert_close(got, rows[:, :, 0].mean(1), atol=1e-12, rtol=0)


BUDGET = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 2e-4}


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_rows_are_fp32_and_as_exact_as_their_inputs(dtype):
    tokens, cls = torch.randn(B, N, D).to(dtype), torch.randn(B, D).to(dtype)
    arguments = block(dtype)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    expected = elip_kernels.cls_attention_from_tokens(tokens.double(), cls.double(), **exact)
    got = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() / expected.max() <= BUDGET[dtype]
    torch.testing.assert_close(got.sum(1), torch.ones(B))


def op_arguments(tokens, **changes):
    """Return tokens and query arguments of an absorbed op, with a fusion of 0.7."""
    dtype, block_ = tokens.dtype, block(torch.promote_types(tokens.dtype, torch.float32))
    cls, text = torch.randn(2, len(tokens), D).to(dtype)
    made = block_ | {"cls": cls, "text": text, "fusion": 0.7, "match": True, "scale": 0.3}
    return tokens, *QueryArguments(**made | changes)


def test_flops_have_no_key_projection_of_the_tokens():
    tokens, cls, arguments = torch.randn(B, N, D), torch.randn(B, D), block(torch.float32)
    with FlopCounterMode(display=False) as counter:
        elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    rows, projections = 2 * B * H * N * D, 2 * B * D * D * 2
    assert counter.get_total_flops() == rows + projections
