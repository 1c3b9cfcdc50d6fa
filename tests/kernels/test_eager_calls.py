"""Calls that leave out the dispatcher, with the PyTorch implementation in place of kernels."""

from unittest.mock import patch

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import elip_kernels
from elip_kernels._operator import OPERATORS

SCORES = torch.rand(2, 6, dtype=torch.float64)


@pytest.fixture
def called():
    """Take CPU tensors as those of a device with kernels; return the ops that are called there."""
    names = []

    def counted(operator):
        def run(*args):
            names.append(operator.name)
            return operator.decomposition(*args)

        return run

    changed = [
        patch.dict(operator.implementations, cpu=counted(operator))
        for operator in OPERATORS.values()
    ]
    for patched in changed:
        patched.start()
    yield names
    for patched in changed:
        patched.stop()


def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)


def reduced(x):
    return elip_kernels.reduce(x, SCORES, 3)


def by_dispatcher(function, *args):
    """Return the result with the dispatcher."""
    with patch("elip_kernels._operator._is_eager", return_value=False):
        return function(*args)


def test_results_and_gradients_are_those_of_the_dispatcher(called):
    def both(x):
        out = reduced(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        return out, grad, second

    results = both(tokens())
    assert set(called) == {"reduce", "reduce_backward"}
    called.clear()
    for one, other in zip(results, by_dispatcher(both, tokens()), strict=True):
        assert torch.equal(one, other)
    assert called == []
    assert torch.autograd.gradcheck(reduced, tokens())
    assert torch.autograd.gradgradcheck(reduced, tokens())


def test_a_cpu_runs_pytorch_without_the_dispatcher():
    expected = by_dispatcher(reduced, tokens())
    with patch.object(OPERATORS["reduce"], "overload", side_effect=AssertionError):
        assert torch.equal(reduced(tokens()), expected)


def test_hooks_of_saved_tensors_are_called(called):
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x)
    with hooks:
        reduced(tokens()).sum().backward()
    assert len(packed) == 2 and called


def test_values_behind_a_negative_bit_are_read(called):
    x = torch._neg_view(tokens().detach())
    assert x.is_neg() and torch.equal(reduced(x), reduced(x.resolve_neg()))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_modes_and_profilers_see_the_op(called):
    with Seen() as mode:
        reduced(tokens())
    assert "elip::reduce" in mode.names and not called
    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    for options in ({}, {"experimental_config": every}):
        with profile(**options) as seen:
            reduced(tokens())
        assert "elip::reduce" in {event.name for event in seen.events()}
    assert not called
