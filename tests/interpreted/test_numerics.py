"""Error budgets at the size of a ViT-B/14: N = 257, D = 768, twelve heads, against fp64."""

import pytest
import torch

import elip_kernels
from tests.interpreted.absorbed import BUDGET, block, error, row_in_fp64

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
N, D, H = 257, 768, 12
INPUTS = {
    "N(0, 1)": lambda x: x,
    "mean 30": lambda x: x + 30,
    "outlier channels": lambda x: x * torch.where(torch.arange(D) % 97 == 5, 50.0, 1.0),
    "outlier tokens": lambda x: x * torch.where(torch.arange(N) % 50 == 7, 20.0, 1.0)[:, None],
}


def inputs(kind, dtype):
    """Return tokens (1, N, D), cls (1, D) and parameters of a block with heads of 64."""
    tokens = INPUTS[kind](torch.randn(1, N, D)).to(dtype)
    return tokens, torch.randn(1, D).to(dtype), block(D, H * 8, dtype) | {"num_heads": H}


@every_dtype
@pytest.mark.parametrize("kind", ["outlier channels"])
def test_row_from_tokens(launches, kind, dtype):
    tokens, cls, arguments = inputs(kind, dtype)
    row = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    assert launches["elip::cls_attention_from_tokens"] == 1
    assert error(row, row_in_fp64(tokens, cls, arguments)) <= BUDGET[dtype]
