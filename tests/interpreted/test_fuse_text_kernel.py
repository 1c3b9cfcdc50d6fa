"""The kernel of fuse_text in the interpreter, against Eq. 1 in fp64."""

import pytest
import torch

from elip_kernels.ops.fuse_text import fuse, fuse_text
from tests.helpers.tiers import tiered
from tests.interpreted.absorbed import BUDGET

SHAPES = [(1, 1, 5), (3, 2, 40), (2, 19, 300), (2, 50, 64)]


@pytest.mark.parametrize("dtype", tiered(BUDGET, [torch.float32, torch.float16]), ids=str)
@pytest.mark.parametrize("guidance_norm", ["none", "match"])
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-N{0[1]}-D{0[2]}".format)
def test_the_first_token_is_fused_and_the_others_are_copied(launches, shape, guidance_norm, dtype):
    B, N, D = shape
    tokens = torch.randn(B, N, 2 * D).to(dtype)[..., :D]  # strided
    text = torch.randn(B, D).to(dtype)
    text[0] = 0  # no text
    for each in (text, text[-1:]):
        out = fuse_text(tokens, each, 0.3, guidance_norm)
        exact = fuse(tokens[:, 0].double(), each.double(), 0.3, guidance_norm == "match")
        assert torch.equal(out[:, 1:], tokens[:, 1:])
        torch.testing.assert_close(out[:, 0], exact.to(dtype))
        assert out.dtype == dtype
    assert launches["elip::fuse_text"] == 2


def test_no_images(launches):
    assert fuse_text(torch.randn(0, 5, 8), torch.randn(1, 8), 0.5).shape == (0, 5, 8)
    assert launches["elip::fuse_text"] == 1
