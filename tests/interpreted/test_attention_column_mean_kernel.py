"""The kernels of attention_column_mean in the interpreter, against PyTorch in fp64."""

from itertools import cycle
from unittest.mock import patch

import pytest
import torch

import elip_kernels
from elip_kernels._operator import OPERATORS
from tests.interpreted.absorbed import BUDGET, error
from tests.kernels.test_attention_column_mean import padded

# B, H, G, M, N, d: full tiles, one more than that, one row; groups of 1, 2 and 4
SHAPES = [
    (2, 4, 2, 70, 130, 64),
    (1, 2, 2, 64, 64, 16),
    (2, 4, 1, 1, 65, 37),
    (1, 3, 3, 129, 1, 8),
    (3, 4, 4, 33, 31, 1),
    (1, 2, 1, 40, 50, 128),
]


def by_kernels(q, k, **options):
    """Return the result of the kernels; raise if the PyTorch implementation runs."""
    never = AssertionError("the PyTorch implementation ran")
    with patch.object(OPERATORS["attention_column_mean"], "reference", side_effect=never):
        return elip_kernels.attention_column_mean(q, k, **options)


def queries_and_keys(B, H, G, M, N, d, dtype=torch.float32):
    return torch.randn(B, H, M, d).to(dtype), torch.randn(B, G, N, d).to(dtype)


def masks(B, M, N, share=0.6):
    """Return masks of keys and queries; for every image the last one is True."""
    mask, query_mask = torch.rand(B, N) < share, torch.rand(B, M) < share
    mask[:, -1] = query_mask[:, -1] = True
    return {"mask": mask, "query_mask": query_mask}


def check(q, k, **options):
    """Compare with fp64, NaN included; return the result of the kernels."""
    got = by_kernels(q, k, **options)
    exact = elip_kernels.attention_column_mean(q.double(), k.double(), **options)
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), exact.isnan())
    if not exact.isnan().all():
        assert error(got.nan_to_num(0), exact.nan_to_num(0)) <= BUDGET[q.dtype]
    return got


@pytest.mark.parametrize("names", [(), ("mask",), ("mask", "query_mask")])
@pytest.mark.parametrize(("shape", "dtype"), zip(SHAPES, cycle(BUDGET), strict=False), ids=str)
def test_agrees_with_fp64(launches, poisoned_memory, shape, dtype, names):
    B, _, _, M, N, d = shape
    if dtype == torch.float32 and d > 64:
        shape = (*shape[:5], 64)  # the limit of fp32
    both_masks = masks(B, M, N)
    check(*queries_and_keys(*shape, dtype), **{name: both_masks[name] for name in names})


def test_masked_entries_may_be_nan(launches):
    (q, k), both_masks = queries_and_keys(2, 4, 2, 70, 130, 16), masks(2, 70, 130)
    got = check(q, k, **both_masks)
    assert not got[~both_masks["mask"]].any()
    assert torch.equal(by_kernels(*padded(q, k, **both_masks), **both_masks), got)


def test_masked_tiles_come_first_and_last(launches):
    q, k = queries_and_keys(1, 2, 2, 20, 200, 16)
    mask = torch.zeros(1, 200, dtype=torch.bool)
    mask[:, 70:75] = True
    check(q, k, mask=mask)
    k[:, :, :70, 0] = -torch.inf
    check(q.abs(), k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["a query", "a key", "a query that does not count"])
def test_non_finite_values_follow_the_reference(launches, where, value):
    (q, k), both_masks = queries_and_keys(2, 2, 2, 40, 70, 16), masks(2, 40, 70)
    both_masks["query_mask"][0, 3] = where == "a query"
    (k if where == "a key" else q)[0, 0, 69 if where == "a key" else 3] = value
    got = check(q, k, **both_masks)
    assert got[1].isfinite().all()
    assert got[0].isnan().all() == (where != "a query that does not count")


def test_large_scores_do_not_overflow(launches):
    """A log-sum-exp of size 1,000 is stored in fp32, so a weight is exact to its rounding."""
    q, k = queries_and_keys(1, 2, 2, 40, 70, 16)
    got = by_kernels(q, k, scale=50.0)
    exact = elip_kernels.attention_column_mean(q.double(), k.double(), scale=50.0)
    largest = 50.0 * (q @ k.mT).abs().max().item()
    assert largest > 700  # exp overflows beyond 89 in fp32
    assert error(got, exact) <= torch.finfo(torch.float32).eps * largest
