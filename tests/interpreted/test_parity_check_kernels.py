"""The check of `python -m elip_kernels.testing` on kernels in the interpreter."""

import pytest
import torch

from elip_kernels._example import EXAMPLES
from elip_kernels.testing.__main__ import SMALL_SHAPE, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_kernels_pass(name, dtype):
    _, _, form, _, _, passed = check(name, dtype, torch.device("cpu"), SMALL_SHAPE)
    assert passed == "yes"
    assert form == ("kernels" if EXAMPLES[name].has_kernels else "PyTorch")
