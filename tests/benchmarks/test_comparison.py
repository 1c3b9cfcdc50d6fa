"""Parity checks of the benchmarks."""

import pytest
import torch

from benchmarks.parity import (
    OURS,
    check_coarser_errors,
    check_errors,
    in_fp64,
    parity,
)

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
