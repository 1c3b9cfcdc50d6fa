"""The kernels of reduce in the interpreter, against PyTorch in fp64."""

import pytest
import torch

import elip_kernels
from elip_kernels.testing import Case, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def in_fp64(tokens, scores, keep, grad_out, **options):
    """Return out, info, gradient of the PyTorch implementation in fp64 (no kernel runs in fp64)."""
    tokens = tokens.detach().double().requires_grad_()
    out, info = elip_kernels.reduce(tokens, scores.double(), keep, return_info=True, **options)
    out.backward(grad_out.double())
    return out.detach(), info, tokens.grad


def check(launches, tokens, scores, keep, **options):
    """Check forward and backward of the kernels: copies exact, sums within the dtype's rounding."""
    before = dict(launches)
    leaf = tokens.detach().requires_grad_()
    out, info = elip_kernels.reduce(leaf, scores, keep, return_info=True, **options)
    grad_out = torch.randn(out.shape).to(out.dtype)
    out.backward(grad_out)
    assert launches["elip::reduce"] == before.get("elip::reduce", 0) + 1
    assert launches["elip::reduce_backward"] == before.get("elip::reduce_backward", 0) + 1

    expected, exact, grad = in_fp64(tokens, scores, keep, grad_out, **options)
    assert torch.equal(info.kept, exact.kept)
    assert torch.allclose(info.weights.double(), exact.weights, atol=1e-6, rtol=0)
    copied = out.shape[1] - options.get("merge", True)
    assert torch.equal(out[:, :copied], expected[:, :copied].to(out.dtype))
    # The interpreter truncates to bf16: one ulp instead of half.
    ulp = torch.finfo(out.dtype).eps
    bound = 1e-6 + 2 * ulp * expected.abs()
    assert ((out.double() - expected).abs() <= bound).all()
    assert ((leaf.grad.double() - grad).abs() <= 1e-6 + 2 * ulp * grad.abs()).all()
    return out, info


@pytest.mark.parametrize(
    "case",
    cases(2, 40, [torch.float32]),
    ids=str,
)
def test_kernel_agrees_with_fp64(launches, case):
    tokens, scores = case.inputs()
    check(launches, tokens, scores, case.K)


@pytest.mark.parametrize("keep", [1, 4, 8, 11])
def test_special_scores_rank_as_the_specification(launches, keep):
    scores = torch.tensor(
        [
            [0.0, -0.0, NAN, INF, -INF, 1.0, 1.0, 1e-42, -NAN, -1.0, 0.0, 9e2],
            [NAN] * 12,
            [-0.0, 0.0] * 6,
            [INF, -INF] * 6,
        ]
    )
    tokens = torch.randn(4, 13, 8)
    check(launches, tokens, scores, keep, merge=False)
    out, _ = check(launches, tokens, scores.abs(), keep)
    assert out.isfinite().all()


def test_kept_tokens_never_touch_the_merged_one(launches):
    tokens, scores = Case(1, 10, 8, 3).inputs()
    tokens[0, 1 + scores[0].argmax()] = NAN
    out, _ = elip_kernels.reduce(tokens, scores, 3, return_info=True)
    assert launches["elip::reduce"] == 1
    assert out[:, -1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(launches, dtype):
    keep = 5
    tokens, scores = Case(4, 19, 24, keep, dtype).inputs()
    real = torch.rand(4, 19) > torch.tensor([0.2, 0.5, 0.8, 1.0])[:, None]
    real[:, 0] = True
    scores[0, 3] = NAN
    _, info = check(launches, tokens, scores, keep, mask=real)
    is_real = real.gather(1, info.kept)
    assert torch.equal(is_real.sum(1), real[:, 1:].sum(1).clamp(max=keep))
    assert not (is_real[:, 1:] & ~is_real[:, :-1]).any()  # padding fills the last slots
    assert torch.equal(info.mask[:, 1:-1], is_real)
    assert torch.equal(info.mask[:, -1], real[:, 1:].sum(1) > keep)


@pytest.mark.parametrize("most", [1024, 16])
def test_a_sum_of_scores_does_not_overflow(launches, monkeypatch, most):
    for name in ("MAX_MOVED", "MAX_SELECTED"):  # 16: by the kernel that reads scores in tiles
        monkeypatch.setattr(f"elip_kernels.launch.{name}", most)
    tokens, scores = Case(2, 70, 32, 20).inputs()
    check(launches, tokens, scores / scores.max() * 3e38, 20)
