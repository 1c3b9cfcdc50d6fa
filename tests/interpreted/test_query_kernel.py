"""The query kernel: products of split terms, mixed dtypes, odd sizes."""

import pytest
import torch

from elip_kernels import launch
from elip_kernels.ops.absorbed_query import QueryArguments, absorbed_query, launch_query

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
N, D, H = 257, 768, 12


def arguments(B=3, D=100, H=3, W=16, dtypes=(fp32,) * 4, scale=0.25, has_norm=True):
    """Return query arguments with these dtypes of CLS token, text, W_q and W_k."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    cls, text, q, k = dtypes
    norm = [drawn(D, dtype=q) for _ in range(2)] if has_norm else [None, None]
    matrices = drawn(H * W, D, dtype=q), drawn(H * W, dtype=q), drawn(H * W, D, dtype=k)
    vectors = drawn(B, D, dtype=cls), drawn(B, D, dtype=text)
    return QueryArguments(*vectors, 0.8, True, *norm, 1e-6, *matrices, H, scale)


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
CASES = [(SIZES[0], dtypes) for dtypes in DTYPES] + [(sizes, DTYPES[4]) for sizes in SIZES[1:]]


@pytest.mark.parametrize(
    ("sizes", "dtypes"),
    CASES,
    ids=str,
)
def test_it_agrees_with_fp64_whatever_the_dtypes(sizes, dtypes):
    assert error(arguments(**sizes, dtypes=dtypes)) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(fp16, 1e-6), (bf16, 1e-5)])
def test_two_rows_of_a_head_hold_more_than_the_dtype_of_the_patches(dtype, bound):
    assert error(arguments(), dtype) < bound


def test_as_many_terms_of_bf16_are_within_the_budget_of_a_row():
    """In PyTorch, because `tl.dot` of bf16 is wrong in the interpreter; 2e-4 is that on GPUs."""
    terms = launch.query(D // H, bf16, torch.empty(1, dtype=fp16))["TERMS"]

    def rounded(x):
        total, rest = torch.zeros_like(x), x
        for _ in range(terms):
            total, rest = total + rest.to(bf16).double(), rest - rest.to(bf16).double()
        return total

    cls, patches, q, k = (
        torch.randn(*shape).double() for shape in [(1, D), (N, D), (D, D), (D, D)]
    )
    q, k = (matrix.to(bf16).double() * D**-0.5 for matrix in (q, k))
    rows = []
    for approximated in (lambda x: x, rounded):
        heads = approximated(approximated(cls) @ q.T).view(H, D // H)
        u = approximated(torch.einsum("hd,hdc->hc", heads, k.view(H, D // H, D)))
        rows.append((u @ patches.T * (D // H) ** -0.5).softmax(1).mean(0))
    exact, row = rows
    assert (row - exact).abs().max() / exact.max() < 2e-4 / 4


@pytest.mark.parametrize("scale", [1e-4, 5e4])
def test_three_terms_of_half_precision_hold_at_every_scale(scale):
    query = arguments(D=96, dtypes=(fp16,) * 4, scale=scale)
    assert launch.query(16, fp32, query.k_weight)["TERMS"] == 3
    assert error(query) < 1e-6
