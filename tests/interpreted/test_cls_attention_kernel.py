"""The kernels of the CLS row in the interpreter, against PyTorch in fp64."""

from itertools import cycle

import pytest
import torch

import elip_kernels
from tests.interpreted.absorbed import BUDGET, block, error, row_in_fp64

SHAPES = [
    (2, 197, 64, 2),
    (2, 257, 40, 4),
    (1, 50, 33, 3),
    (2, 2, 32, 1),
    (1, 20, 96, 24),
    (3, 17, 1, 1),
]


@pytest.mark.parametrize(("shape", "dtype"), zip(SHAPES, cycle(BUDGET), strict=False), ids=str)
def test_absorbed_row_agrees_with_fp64(launches, shape, dtype):
    B, N, D, H = shape
    tokens, cls = torch.randn(B, N, D).to(dtype), torch.randn(B, D).to(dtype)
    arguments = block(D, H, dtype)
    got = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    assert launches["elip::cls_attention_from_tokens"] == 1
    assert got.dtype == torch.float32
    assert error(got, row_in_fp64(tokens, cls, arguments)) <= BUDGET[dtype]


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_a_mean_far_from_zero_does_not_cancel(launches, dtype):
    tokens, cls = (30 + torch.randn(2, 40, 64)).to(dtype), torch.randn(2, 64).to(dtype)
    arguments = block(64, 2, dtype)
    got = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    exact = row_in_fp64(tokens, cls, arguments)
    eager = 2 * error(_eager(tokens, cls, arguments), exact)
    assert error(got, exact) <= max(eager, BUDGET[dtype])


def _eager(tokens, cls, arguments):
    """Return the row as a block computes it, in the dtype of the tokens."""
    x = torch.cat([cls[:, None], tokens[:, 1:]], dim=1)
    norm = (arguments["norm_weight"], arguments["norm_bias"])
    x = torch.nn.functional.layer_norm(x, x.shape[2:], *norm, arguments["eps"])
    q = torch.nn.functional.linear(x[:, 0], arguments["q_weight"], arguments["q_bias"])
    k = torch.nn.functional.linear(x, arguments["k_weight"])
    q, k = (t.unflatten(-1, (arguments["num_heads"], -1)) for t in (q, k))
    return (torch.einsum("bhd,bnhd->bhn", q, k) * q.shape[-1] ** -0.5).float().softmax(-1).mean(1)


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_generic_row_agrees_with_fp64(launches, masked, dtype):
    d = 37
    q, k = torch.randn(2, 3, d).to(dtype), torch.randn(2, 3, 45, d).to(dtype)
    mask = torch.rand(2, 45) > 0.3 if masked else None
    got = elip_kernels.cls_attention(q, k, mask=mask)
    exact = elip_kernels.cls_attention(q.double(), k.double(), mask=mask)
    assert launches["elip::cls_attention"] == 1  # fp64 runs PyTorch
    assert error(got, exact) <= BUDGET[dtype]


@pytest.mark.parametrize("closed", ["by the mask", "by its scores"])
def test_a_tile_of_fully_masked_keys(launches, closed):
    q, k = torch.ones(1, 2, 8), torch.randn(1, 2, 130, 8)
    mask = torch.ones(1, 130, dtype=torch.bool)
    if closed == "by the mask":
        mask[:, 1:65] = False
    else:
        k[:, :, 1:65, 0] = -torch.inf
    got = elip_kernels.cls_attention(q, k, mask=mask)
    exact = elip_kernels.cls_attention(q.double(), k.double(), mask=mask)
    assert not got[:, 1:65].any() and error(got, exact) <= 1e-5
