"""Sums of rows by index: the methods for CUDA and for ONNX give the same as that for CPUs."""

import pytest
import torch

from elip_kernels.ops import gather_ops
from elip_kernels.ops.gather_ops import sums_by


@pytest.mark.parametrize("way", ["CUDA", "ONNX"])
def test_all_ways_add_up_the_same(monkeypatch, way):
    values, rows = torch.randn(40, 7).double(), torch.randint(0, 9, (40,)).int()
    here = sums_by(rows, values, 11)
    if way == "CUDA":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    else:
        monkeypatch.setattr(gather_ops, "exports_onnx", lambda: True)
    assert torch.equal(sums_by(rows, values, 11), here) and not here[9:].any()
