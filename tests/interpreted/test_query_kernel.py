"""The query kernel: products of split terms, mixed dtypes, odd sizes."""

import itertools

import pytest
import torch

from elip_kernels import launch
from elip_kernels.ops.absorbed_query import QueryArguments, absorbed_query, launch_query
from tests.helpers.tiers import tiered

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def arguments(B=3, D=100, H=3, W=16, dtypes=(fp32,) * 4, scale=0.25, has_norm=True):
    """Return query arguments with these dtypes of CLS token, text, W_q and W_k."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    cls, text, q, k = dtypes
    norm = [drawn(D, dtype=q) for _ in range(2)] if has_norm else [None, None]
    matrices = drawn(H * W, D, dtype=q), drawn(H * W, dtype=q), drawn(H * W, D, dtype=k)
    given = drawn(B, D, dtype=cls), drawn(B, D, dtype=text)
    return QueryArguments(*given, 0.8, True, *norm, 1e-6, *matrices, H, scale)


def error(query, dtype=fp32):
    """Return the error of u and of the CLS score against fp64, relative to the largest value."""
    u, score, z = launch_query(query, dtype, normed=True)
    assert u.dtype == dtype
    u = u.float().sum(2)  # rounded + rest
    expected, normed = absorbed_query(torch.float64, query)
    expected_score = torch.einsum("bhd,bd->bh", expected, normed)
    pairs = (u, expected), (score, expected_score), (z, normed)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


DTYPES = [
    (fp32, fp32, fp32, fp32),
    (fp16, fp16, fp16, fp16),
    (bf16, bf16, bf16, bf16),
    (fp32, bf16, fp32, fp32),
    (bf16, fp32, bf16, bf16),
    (fp32, fp32, fp16, fp32),
    (fp16, fp32, fp32, fp16),
]


SIZES = [{}, {"B": 17, "D": 300, "H": 2, "W": 24}, {"W": 6}]
QUICK = [(SIZES[0], dtypes) for dtypes in DTYPES] + [(sizes, DTYPES[4]) for sizes in SIZES[1:]]


@pytest.mark.parametrize(
    ("sizes", "dtypes"), tiered(itertools.product(SIZES, DTYPES), QUICK), ids=str
)
def test_it_agrees_with_fp64_whatever_the_dtypes(sizes, dtypes):
    assert error(arguments(**sizes, dtypes=dtypes)) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(fp16, 1e-6), (bf16, 1e-5)])
def test_two_rows_of_a_head_hold_more_than_the_dtype_of_the_patches(dtype, bound):
    assert error(arguments(), dtype) < bound


@pytest.mark.parametrize("scale", [1e-4, 5e4])
def test_three_terms_of_half_precision_hold_at_every_scale(scale):
    query = arguments(D=96, dtypes=(fp16,) * 4, scale=scale)
    assert launch.query(16, fp32, query.k_weight)["TERMS"] == 3
    assert error(query) < 1e-6


def test_several_dtypes_have_fewer_pipeline_stages():
    one = launch.query(64, bf16, torch.empty(1, dtype=bf16))
    both = launch.query(64, bf16, torch.empty(1, dtype=bf16), None, torch.empty(1))
    assert both["STAGES"] < one["STAGES"]
    assert both["BLOCK_D"] < one["BLOCK_D"]
