"""Sums and orders: the methods for CUDA and for exported graphs give the same as those for CPUs."""

import pytest
import torch

from elip_kernels.ops.gather_ops import largest, largest_by_rank, sums_by


@pytest.mark.parametrize("way", ["CUDA", "exported"])
def test_all_ways_add_up_the_same(monkeypatch, way):
    values, rows = torch.randn(40, 7).double(), torch.randint(0, 9, (40,)).int()
    here = sums_by(rows, values, 11)
    if way == "CUDA":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    else:
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(sums_by(rows, values, 11), here) and not here[9:].any()


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_ranks_order_equal_scores_as_a_stable_sort_does(count):
    scores = torch.randint(0, 6, (3, 40)).float()
    scores[scores == 0] = -torch.inf
    assert torch.equal(largest_by_rank(scores, count), largest(scores, count))
