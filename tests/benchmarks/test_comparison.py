"""Parity checks, cold caches, CUDA graphs and detection of kernels in the benchmarks."""

from contextlib import ExitStack, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch

from benchmarks import cases, comparison, tune
from benchmarks.bench_reduce import forms_of
from benchmarks.cases import copies
from benchmarks.parity import (
    OURS,
    check_coarser_errors,
    check_errors,
    in_fp64,
    parity,
    with_compiled,
)
from elip_kernels.testing import Case

NAN, INF = float("nan"), float("inf")


def test_the_bound_is_twice_the_error_of_the_replaced_form():
    exact, near, far = (torch.full((3,), x, dtype=torch.float64) for x in (1.0, 1.001, 1.003))
    assert parity((exact,), {"eager": (near,), OURS: (near,)})["passed"]
    with pytest.raises(AssertionError, match="parity"):
        parity((exact,), {"eager": (near,), OURS: (far,)})
    with pytest.raises(AssertionError, match="parity"):
        check_errors({"official": 0.0, "last": 1e-3}, ours=["last"])


def test_a_coarser_form_is_compared_in_its_dtype():
    checked = check_coarser_errors({"bf16": 5e-3}, 4e-3, "bf16")
    assert checked["dtype"] == "bf16" and 8e-3 <= checked["bound"] <= 8.01e-3
    with pytest.raises(AssertionError, match="parity"):
        check_coarser_errors({"bf16": 9e-3}, 4e-3, "bf16")


def test_only_a_compiled_sum_may_differ_by_its_order_of_adding():
    exact, near = torch.ones(3).double(), torch.full((3,), 1 + 5e-6)
    outputs = {"eager": torch.ones(3), OURS: torch.ones(3), "compiled": near}
    with pytest.raises(AssertionError, match="parity"):
        parity((exact,), {name: (each,) for name, each in outputs.items()})
    checked = parity((exact,), {name: (each,) for name, each in outputs.items()}, summed=3000)
    assert checked["coarser"]["errors"].keys() == {"compiled", "fp32, summed in order"}
    outputs |= {OURS: near, "compiled": torch.ones(3)}
    with pytest.raises(AssertionError, match="parity"):
        parity((exact,), {name: (each,) for name, each in outputs.items()}, summed=3000)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("spoilt", ["eager", OURS])
def test_parity_needs_finite_outputs(spoilt, value):
    exact, ones = torch.ones(4, 3).double(), torch.ones(4, 3)
    outputs = {name: (ones, ones) for name in ("official", "eager", OURS)}
    assert parity((exact, exact), outputs)["passed"]
    with pytest.raises(AssertionError, match="parity"):
        parity((exact, exact), outputs | {spoilt: (ones, torch.full((4, 3), value))})


@pytest.mark.parametrize("shape", [(4, 1, 5), (2, 3, 5), (4, 3, 1), (5, 3, 5)])
def test_parity_needs_equal_shapes(shape):
    ones = torch.ones(4, 3, 5)
    with pytest.raises(AssertionError, match="parity"):
        parity((ones.double(),), {"eager": (ones,), OURS: (torch.ones(shape),)})


@pytest.mark.parametrize("image", [0, 7, 15])
def test_parity_compares_every_image(image):
    (exact,) = in_fp64((torch.ones(16, 3),), 4)
    wrong = torch.ones(16, 3)
    wrong[image, 1] = 1.5
    assert exact.shape == (4, 3)
    with pytest.raises(AssertionError, match="parity"):
        parity((exact,), {"eager": (torch.ones(16, 3),), OURS: (wrong,)})


@pytest.fixture
def fake_device():
    """Replace CUDA graphs by ones that record nothing, on a device with 1,000 bytes of L2 cache."""
    fakes = {"Stream": Mock(), "current_stream": Mock(), "CUDAGraph": Mock()}
    fakes |= {name: lambda *args, **kwargs: nullcontext() for name in ("stream", "graph")}
    fakes["get_device_properties"] = lambda device: SimpleNamespace(L2_cache_size=1000)
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(patch.object(torch.cuda, name, fake))
        for file in (cases, comparison, tune):
            stack.enter_context(patch.object(file, "ON_GPU", True))
        yield


def test_sets_of_inputs_are_twice_the_cache(fake_device):
    tokens, grad = torch.randn(3, 10, requires_grad=True), torch.randn(2, 10)
    for read, count in (((tokens, grad), 10), ((grad,), 25), ((torch.ones(9, 99),), 1)):
        sets = copies((tokens, grad), read)
        assert len(sets) == count
        assert count * sum(t.nbytes for t in read) >= 2000
        assert len({t.data_ptr() for each in sets for t in each}) == 2 * count
        assert all(each[0].requires_grad and torch.equal(each[1], grad) for each in sets)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_output_overwrites_an_earlier_one(direction):
    sets = [(torch.randn(2, 9, 4, requires_grad=True), torch.rand(2, 8), torch.randn(2, 5, 4))] * 3
    if direction == "forward":
        sets = [(tokens.detach(), scores) for tokens, scores, _ in sets]
    outputs = comparison._prepare(forms_of(3)[OURS], direction, sets)()
    assert len({t.data_ptr() for each in outputs for t in each}) == 3


def test_the_compiled_form_allows_repeated_backward_passes(monkeypatch):
    case = Case(2, 9, 64, 3)
    tokens, scores = case.inputs()
    inputs = tokens.requires_grad_(), scores, torch.randn(2, 5, 64)
    monkeypatch.setattr("benchmarks.parity.COMPILED", [case])
    monkeypatch.setattr("shutil.which", lambda name: name)
    own = torch.compile
    monkeypatch.setattr(torch, "compile", partial(own, backend="aot_eager"))
    forms, left_out = with_compiled(forms_of(3), case, inputs)
    assert left_out == {}
    expected, compiled = (
        comparison._prepare(forms[name], "backward", [inputs]) for name in ("eager", "compiled")
    )
    for _ in range(2):
        torch.testing.assert_close(compiled(), expected())
