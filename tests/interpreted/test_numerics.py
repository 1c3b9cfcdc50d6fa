"""Error budgets at the size of a ViT-B/14: N = 257, D = 768, twelve heads, against fp64."""

import pytest
import torch

import elip_kernels
from elip_kernels.testing import Case
from tests.helpers.tiers import tiered
from tests.interpreted import test_bipartite_kernel as bipartite
from tests.interpreted import test_nearest_kernel as nearest
from tests.interpreted import test_reduce_kernel as reduce
from tests.interpreted.absorbed import BUDGET, block, error, row_in_fp64

every_dtype = pytest.mark.parametrize(
    "dtype", tiered(BUDGET, [torch.bfloat16], slow=[torch.float32]), ids=str
)
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
@pytest.mark.parametrize("kind", tiered(INPUTS, ["outlier channels"], slow=["mean 30"]))
def test_row_from_tokens(launches, kind, dtype):
    tokens, cls, arguments = inputs(kind, dtype)
    row = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    assert launches["elip::cls_attention_from_tokens"] == 1
    assert error(row, row_in_fp64(tokens, cls, arguments)) <= BUDGET[dtype]


@every_dtype
def test_generic_row(launches, dtype):
    q, k = torch.randn(1, H, D // H).to(dtype), torch.randn(1, H, N, D // H).to(dtype)
    row = elip_kernels.cls_attention(q, k)
    assert launches["elip::cls_attention"] == 1
    assert error(row, elip_kernels.cls_attention(q.double(), k.double())) <= BUDGET[dtype]


@pytest.mark.parametrize("keep", [230, 102])
@every_dtype
def test_reduce(launches, keep, dtype):
    tokens, scores = Case(1, N, D, keep, dtype).inputs()
    out, _ = reduce.check(launches, tokens, scores, keep)
    exact = elip_kernels.reduce(tokens.double(), scores.double(), keep)
    assert torch.equal(out[:, :-1].double(), exact[:, :-1])
    if dtype == torch.float32:
        assert (out[:, -1] - exact[:, -1]).abs().max() <= 1e-6


@every_dtype
def test_bipartite_merge(launches, dtype):
    tokens, metric, size = bipartite.inputs(1, N, D, D // H, dtype)
    bipartite.check(launches, tokens, metric, 64, size)


@every_dtype
def test_merge_nearest(launches, dtype):
    nearest.check(launches, *nearest.inputs(1, N, D, D // H, 166, dtype=dtype))
