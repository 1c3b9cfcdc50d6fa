"""As many tokens as images of 1,024 pixels have, and the same bits whatever the batch."""

import pytest
import torch

import elip_kernels
from elip_kernels._operator import OPERATORS
from tests.interpreted.test_cls_attention_kernel import BUDGET, block, error
from tests.interpreted.test_score_reduce_kernel import in_fp64
from tests.tiers import tiered

SIZES = [(785, 24), (1025, 24), (1370, 24), (2305, 16), (4097, 16)]


@pytest.mark.parametrize("dtype", tiered(BUDGET, [torch.bfloat16]), ids=str)
@pytest.mark.parametrize(("N", "D"), tiered(SIZES, SIZES[1:2] + SIZES[-1:]))
def test_a_boundary_of_many_tokens_runs_the_kernels(launches, monkeypatch, N, D, dtype):
    def never(*args):
        raise AssertionError("the PyTorch form ran")

    keep, tokens, cls = N // 3, torch.randn(1, N, D).to(dtype), torch.randn(1, D).to(dtype)
    arguments, tokens = block(D, 2, dtype), tokens.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(OPERATORS["score_reduce"], "reference", never)
        out, info, row = elip_kernels.score_reduce(tokens, cls, keep, return_info=True, **arguments)
    assert launches["elip::score_reduce"] == 1
    _, _, exact_row = in_fp64(tokens, cls, keep, arguments)
    assert error(row, exact_row) <= BUDGET[dtype]
    expected, exact = elip_kernels.reduce(
        tokens.detach().double(), row.double(), keep, return_info=True
    )
    assert torch.equal(info.kept, exact.kept)
    assert torch.equal(out[:, : keep + 1], expected[:, : keep + 1].to(dtype))
    scale = torch.finfo(dtype).eps * expected.abs() + 1e-6
    assert ((out.double() - expected).abs() <= 2 * scale).all()
    out.sum().backward()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("dtype", tiered(BUDGET, [torch.bfloat16]), ids=str)
def test_an_image_selects_the_same_alone_and_in_a_batch_of_two_hundred(launches, dtype):
    """Images that come first in a tile of 16: here a product's last bit hangs on the row that it is
    in, in tensor cores it does not."""
    B, N, D = 200, 10, 32
    tokens, cls, text = torch.randn(B, N, D), torch.randn(B, D), torch.randn(B, D)
    tokens, cls, text = (t.to(dtype) for t in (tokens, cls, text))
    options = block(D, 2, dtype) | {"keep": 4, "fusion": 0.5, "return_info": True}
    whole, info, row = elip_kernels.score_reduce(tokens, cls, text=text, **options)
    for i in (0, 16, 96, 192):
        one = slice(i, i + 1)
        given = tokens[one], cls[one]
        alone, its, own = elip_kernels.score_reduce(*given, text=text[one], **options)
        assert torch.equal(own, row[one]) and torch.equal(its.kept, info.kept[one])
        assert torch.equal(its.weights, info.weights[one]) and torch.equal(alone, whole[one])
    assert launches["elip::score_reduce"] == 5
