"""The helpers of tests/gpu, tested without a GPU."""

import pytest
import torch

from elip_kernels._triton import HAS_TRITON
from elip_kernels.testing import launchers_on_cpu
from tests.gpu.ops import OPS, example, kernels_alone

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPS)
def test_kernels_alone_raises_in_the_pytorch_implementation(name):
    arguments = example(name, CPU, 2, 30, torch.float64)  # no kernel supports fp64
    with launchers_on_cpu():
        OPS[name].outputs(arguments)
        with kernels_alone(), pytest.raises(AssertionError, match="the PyTorch implementation ran"):
            OPS[name].outputs(arguments)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so no kernel is launched")
@pytest.mark.parametrize("name", OPS)
def test_kernels_alone_lets_kernels_run(name):
    from benchmarks.kernel_analysis.compile import recorded_launches

    with recorded_launches(90) as launches, kernels_alone():
        OPS[name].outputs(example(name, CPU, 2, 30, torch.float32))
    assert launches
