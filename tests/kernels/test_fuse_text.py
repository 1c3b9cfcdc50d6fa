"""fuse_text: the fused CLS token, and the tokens behind it."""

import pytest
import torch
from torch.library import opcheck

from elip_kernels import fuse_text
from elip_kernels.ops.fuse_text import fuse


def test_the_fused_token_comes_first_without_gradient():
    tokens, text = torch.randn(2, 5, 6, requires_grad=True), torch.randn(1, 6)
    out = fuse_text(tokens, text, 0.8, "match")
    assert torch.equal(out[:, 0], fuse(tokens[:, 0], text, 0.8, True))
    assert torch.equal(out[:, 1:], tokens[:, 1:])
    assert not out.requires_grad


@pytest.mark.parametrize(("text", "fusion"), [(None, 0.8), (torch.randn(2, 6), 1.0)])
def test_without_a_text_nothing_is_copied(text, fusion):
    tokens = torch.randn(2, 5, 6)
    assert fuse_text(tokens, text, fusion).data_ptr() == tokens.data_ptr()


def test_opcheck():
    opcheck(torch.ops.elip.fuse_text.default, (torch.randn(2, 5, 6), torch.randn(2, 6), 0.8, True))
