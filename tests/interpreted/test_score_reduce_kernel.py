"""The four kernels of score_reduce in the interpreter, against PyTorch in fp64."""

import pytest
import torch

import elip_kernels
from tests.interpreted.absorbed import BUDGET, block, error

CASES = [  # B, N, D, H, K, and whether dropped tokens are merged
    ((1, 50, 33, 4, 1), True),
    ((1, 50, 33, 4, 1), False),
    ((2, 18, 96, 24, 15), True),
]


def in_fp64(tokens, cls, keep, arguments, **options):
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    return elip_kernels.score_reduce(
        tokens.double(), cls.double(), keep, return_info=True, **wide, **options
    )


@pytest.mark.parametrize(("case", "dtype"), zip(CASES, BUDGET, strict=True), ids=str)
def test_four_kernels_agree_with_fp64(launches, poisoned_memory, case, dtype):
    shape, merge = case
    B, N, D, H, keep = shape
    tokens, cls = torch.randn(B, N, D).to(dtype).requires_grad_(), torch.randn(B, D).to(dtype)
    arguments = block(D, H, dtype)
    out, info, row = elip_kernels.score_reduce(
        tokens, cls, keep, merge=merge, return_info=True, **arguments
    )
    assert launches["elip::score_reduce"] == 1
    _, _, exact_row = in_fp64(tokens, cls, keep, arguments, merge=merge)
    assert error(row, exact_row) <= BUDGET[dtype]
    # Given this row, selection and movement equal the reference.
    expected, exact = elip_kernels.reduce(
        tokens.detach().double(), row.double(), keep, merge=merge, return_info=True
    )
    assert torch.equal(info.kept, exact.kept)
    torch.testing.assert_close(info.weights.double(), exact.weights, atol=1e-6, rtol=0)
    ulp = torch.finfo(dtype).eps
    assert torch.equal(out[:, : keep + 1], expected[:, : keep + 1].to(dtype))
    assert ((out.double() - expected).abs() <= 1e-6 + 2 * ulp * expected.abs()).all()
    for known in (row, row.t().contiguous().t()):  # also transposed in memory
        again = elip_kernels.score_reduce(tokens, cls, keep, merge=merge, row=known, **arguments)
        assert torch.equal(again, out)
    out.sum().backward()
    assert launches["elip::reduce_backward"] == 1
    assert tokens.grad.isfinite().all()
