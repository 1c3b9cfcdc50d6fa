"""The check of `python -m elip_kernels.testing` on kernels in the interpreter."""

import pytest
import torch

from elip_kernels.testing.__main__ import OPS, SMALL_SHAPE, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_the_kernels_pass(name, dtype):
    _, _, form, _, _, passed = check(name, dtype, torch.device("cpu"), SMALL_SHAPE)
    assert passed == "yes"
    assert form == ("PyTorch" if name in ("fuse_text", "unmerge") else "kernels")
