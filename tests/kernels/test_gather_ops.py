"""Sums of rows by index: the method for CUDA, which sorts, gives the same as that for CPUs."""

import pytest
import torch

from elip_kernels.ops.gather_ops import sums_by


@pytest.mark.parametrize("shape", [(40,), (40, 7)])
def test_both_ways_add_up_the_same(monkeypatch, shape):
    values, rows = torch.randn(shape).double(), torch.randint(0, 9, (40,)).int()
    here = sums_by(rows, values, 11)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    sorting = sums_by(rows, values, 11)
    assert torch.equal(sorting, here) and not here[9:].any()
