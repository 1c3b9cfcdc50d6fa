"""fuse_text: the fused CLS token, and the tokens behind it."""

import pytest
import torch

from elip_kernels import fuse_text
from elip_kernels.ops.fuse_text import fuse

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("guidance_norm", ["none", "match"])
@pytest.mark.parametrize("fusion", [0.0, 0.3])
def test_the_fused_token_is_rounded_once_and_others_are_copied(fusion, guidance_norm, dtype):
    tokens = torch.randn(3, 5, 12).to(dtype)[..., :6].requires_grad_()  # strided
    text = torch.randn(3, 6).to(dtype)
    text[0] = 0  # no text
    for guide in (text[-1:], text):
        out = fuse_text(tokens, guide, fusion, guidance_norm)
        exact = fuse(tokens[:, 0].double(), guide.double(), fusion, guidance_norm == "match")
        half_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(out[:, 0].double(), exact, atol=1e-6, rtol=1.001 * half_ulp)
        assert torch.equal(out[:, 1:], tokens[:, 1:])
        assert out.dtype == dtype and not out.requires_grad
    assert torch.equal(out[0, 0], tokens[0, 0])
    assert (out[1:, 0] != tokens[1:, 0]).any(1).all()


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 1, 6)])
def test_no_image_and_no_patch(shape):
    assert fuse_text(torch.randn(shape), torch.randn(1, 6), 0.5).shape == shape


@pytest.mark.parametrize(("text", "fusion"), [(None, 0.8), (torch.randn(2, 6), 1.0)])
def test_without_a_text_nothing_is_copied(text, fusion):
    tokens = torch.randn(2, 5, 6)
    assert fuse_text(tokens, text, fusion).data_ptr() == tokens.data_ptr()
