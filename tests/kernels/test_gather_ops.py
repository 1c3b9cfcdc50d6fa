"""Sums of rows by index: the method for CUDA, which sorts, gives the same as that for CPUs."""

import pytest
import torch

from elip_kernels.ops.gather_ops import add_rows, sums_by


@pytest.mark.parametrize("shape", [(40,), (40, 7)])
def test_both_ways_add_up_the_same(monkeypatch, shape):
    values, rows = torch.randn(shape).double(), torch.randint(0, 9, (40,)).int()
    here = sums_by(rows, values, 11)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    sorting = sums_by(rows, values, 11)
    assert torch.equal(sorting, here) and not here[9:].any()


def test_weights_and_images_are_kept_apart():
    x, rows, weight = torch.randn(2, 5, 3), torch.tensor([[0, 1, 1, 0, 2]] * 2), torch.rand(2, 5)
    got = add_rows(x, rows, weight, 3)
    for b in range(2):
        parts = [x[b][rows[b] == r].mul(weight[b][rows[b] == r, None]).sum(0) for r in range(3)]
        torch.testing.assert_close(got[b], torch.stack(parts))
