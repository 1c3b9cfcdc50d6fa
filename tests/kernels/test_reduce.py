"""reduce as users call it: the PyTorch implementation, the kernels' limits, PyTorch features."""

import re
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

import elip_kernels
from elip_kernels import _operator, launch
from elip_kernels._operator import OPERATORS
from elip_kernels._triton import HAS_TRITON
from elip_kernels.testing import Case, cases


def definition(tokens, scores, keep):
    """Compute Eq. 3-4 for one image with Python lists."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n].item(), n))
    kept, dropped = sorted(order[:keep]), order[keep:]
    mass = sum(scores[n].item() for n in dropped)
    merged = sum(tokens[1 + n].double() * (scores[n].item() / (mass + 1e-6)) for n in dropped)
    return torch.stack([tokens[0], *(tokens[1 + n] for n in kept), merged.to(tokens.dtype)]), kept


@pytest.mark.parametrize("case", cases(2, 16, (torch.float32,)), ids=str)
def test_is_the_papers_definition(case):
    tokens, scores = case.inputs()
    out, info = elip_kernels.reduce(tokens, scores, case.K, return_info=True)
    for b in range(case.B):
        expected, kept = definition(tokens[b], scores[b], case.K)
        assert (info.kept[b] - 1).tolist() == kept
        torch.testing.assert_close(out[b], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_ties_go_to_the_lower_index_in_image_order(keep):
    scores = torch.full((1, 8), 0.125)
    _, info = elip_kernels.reduce(torch.randn(1, 9, 4), scores, keep, return_info=True)
    assert info.kept.tolist() == [list(range(1, keep + 1))]


def test_keep_as_ratio_and_count():
    tokens, scores = Case(1, 11, 4, 1).inputs()
    assert elip_kernels.reduce(tokens, scores, 1).shape[1] == 3
    assert elip_kernels.reduce(tokens, scores, 0.59).shape[1] == 5 + 2
    assert elip_kernels.reduce(tokens, scores, 0.01).shape[1] == 3
    assert elip_kernels.reduce(tokens, scores, 0.59, merge=False).shape[1] == 5 + 1
    assert elip_kernels.reduce(tokens, scores, 1.0) is tokens
    out, info = elip_kernels.reduce(tokens, scores, 10, return_info=True)
    assert out is tokens
    assert info.kept.tolist() == [list(range(1, 11))]
    assert not info.weights.any()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_in_fp64(check, merge):
    tokens = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(2, 8, dtype=torch.float64)
    real = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    assert check(
        lambda t: elip_kernels.reduce(t, scores, 3, merge=merge, mask=real).square(), (tokens,)
    )


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so no kernel runs")
def test_an_unsupported_size_warns_once():
    from elip_kernels.testing import launchers_on_cpu

    OPERATORS["reduce"].warned_reasons.clear()
    with launchers_on_cpu(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for N in (70_000, 70_001):
            elip_kernels.reduce(torch.randn(1, N, 4), torch.rand(1, N - 1), 9)
    (warning,) = caught
    assert issubclass(warning.category, _operator.FallbackWarning)
    assert re.search(r"elip::reduce: .*\(1, 70000, 4\).*at most 65,536", str(warning.message))


@pytest.mark.parametrize(
    ("p", "N", "fits"), [(0, 65_537, False), (1, 65_537, True), (5, 65_541, True)]
)
def test_the_kernels_take_65536_candidates(p, N, fits):
    tokens, scores = torch.empty(1, N, 4), torch.empty(1, N - p)
    operator = OPERATORS["reduce"]
    assert (operator.unsupported(tokens, scores, None, 3, p, True) is None) is fits
    assert "16 prefix" in operator.unsupported(tokens[:, :40], scores[:, :20], None, 3, 20, True)


def test_padding_garbage_stays_out():
    tokens, scores = Case(1, 9, 4, 3).inputs()
    real = torch.tensor([[True] * 6 + [False] * 3])
    tokens[:, 6:] = float("nan")
    scores[:, 5:] = 9.0
    out, info = elip_kernels.reduce(tokens, scores, 3, mask=real, return_info=True)
    assert out.isfinite().all()
    assert (info.kept < 6).all()
    assert info.mask.all()


@pytest.fixture
def old_device(monkeypatch):
    """The capability of an older GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    launch.unsupported_device.cache_clear()
    yield
    launch.unsupported_device.cache_clear()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so no kernel runs")
def test_an_older_gpu_runs_pytorch(old_device):
    with FakeTensorMode():
        tokens, scores = torch.empty(2, 9, 4, device="cuda"), torch.empty(2, 8, device="cuda")
    reason = OPERATORS["reduce"].unsupported(tokens, scores, None, 3, 1, True)
    assert reason == "the kernels need compute capability 8.0, and cuda:0 has 7.5"
    assert OPERATORS["reduce"].unsupported(*Case(2, 9, 4, 3).inputs(), None, 3, 1, True) is None


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so no kernel runs")
def test_a_kernel_that_the_device_has_no_room_for_runs_pytorch(monkeypatch):
    from triton.runtime import OutOfResources

    from elip_kernels.testing import launchers_on_cpu

    def launcher(*args):
        raise OutOfResources(300_000, 232_448, "shared memory")

    operator = OPERATORS["reduce"]
    monkeypatch.setattr(operator, "launcher", launcher)
    monkeypatch.setattr(operator, "warned_reasons", set())
    tokens, scores = Case(2, 9, 4, 3).inputs()
    with launchers_on_cpu(), pytest.warns(_operator.FallbackWarning, match="shared memory"):
        out = elip_kernels.reduce(tokens, scores, 3)
    assert torch.equal(out, elip_kernels.reduce(tokens, scores, 3))
