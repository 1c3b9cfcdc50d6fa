"""No op reads its data on the host, so none synchronises: all run on fake tensors, without data.

A fake tensor raises if the host reads a value (`item`, `bool`) or a shape that depends on values
(`nonzero`, a boolean index). The public functions run with autograd; then both implementations of
each op that they called run, with launches that do nothing.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._pytree import tree_map_only

from elip_kernels import launch
from elip_kernels._example import EXAMPLES
from elip_kernels._operator import OPERATORS
from elip_kernels._triton import HAS_TRITON
from elip_kernels.testing import WITH_KERNELS, RecordedCalls, call
from tests.helpers.own_warnings import FALLBACK

DATA_READ = (DataDependentOutputException, DynamicOutputShapeException)


def run(name, dtype):
    """Run forward, and backward if there is one; return the calls of ops."""
    with RecordedCalls() as recorded:
        call(name, 2, 19, 24, 12, 3, dtype)
    return recorded.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_public_functions_do_not_read_data(name, dtype):
    with FakeTensorMode():
        fake = run(name, dtype)
    assert [op for op, _ in fake] == [op for op, _ in run(name, dtype)]


@FALLBACK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_launchers_and_references_do_not_read_data(name, dtype, monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, *args, **kw: launched.append(kernel))
    for op, arguments in run(name, dtype):
        operator = OPERATORS[op]
        has_kernels = operator.unsupported(*arguments) is None
        for form in (operator.reference, *([operator.launch] if has_kernels else [])):
            with FakeTensorMode() as mode:
                form(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    assert bool(launched) == (HAS_TRITON and dtype != torch.float64)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
def test_a_read_is_found(read):
    read(torch.ones(3))
    with FakeTensorMode(), pytest.raises(DATA_READ):
        read(torch.ones(3))
