"""`Kernel`: launches with a short key have the code and the arguments of Triton's own launches."""

import threading

import pytest
import torch

from elip_kernels import _kernel
from elip_kernels._triton import HAS_TRITON, tl

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so nothing is launched")

if HAS_TRITON:
    from triton.runtime.jit import JITFunction

    from benchmarks.kernel_analysis.stub_device import stub_device
    from elip_kernels._kernel import Kernel, kernel


@pytest.fixture(autouse=True)
def _short_launch(monkeypatch):
    """Use the short launch under any version of Triton; if all tests pass, it may be listed."""
    monkeypatch.setattr(_kernel, "IS_TESTED", True)


@pytest.fixture
def double():
    """A small kernel that has no compiled form yet."""

    @kernel(do_not_specialize=["K"])
    def double_kernel(x_ptr, y_ptr, N, K, factor, BLOCK: tl.constexpr, FLAG: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
        if y_ptr is not None:
            x += tl.load(y_ptr + offs, mask=offs < N, other=0.0)
        tl.store(x_ptr + offs, x * factor + K + FLAG, mask=offs < N)

    return double_kernel


@pytest.fixture
def device():
    with stub_device() as driver:
        yield driver


X = torch.zeros(65)
ARGUMENTS = {
    "as before": (X, None, 32, 5, 2.0),
    "other values": (torch.ones(64), None, 64, 7, 3.0),
    "a second tensor": (X, X, 32, 5, 2.0),
    "another type": (X.half(), None, 32, 5, 2.0),
    "not aligned": (X[1:], None, 32, 5, 2.0),
    "no multiple of 16": (X, None, 33, 5, 2.0),
    "one": (X, None, 1, 5, 2.0),
    "64 bits": (X, None, 32, 2**33, 2.0),
    "64 bits, divisible": (X, None, 2**33, 5, 2.0),
    "an integer factor": (X, None, 32, 5, 2),
}
CONSTANTS = {"BLOCK": 64, "FLAG": True, "num_warps": 4}


def launch(function, arguments, **others):
    return function[(3, 2)](*arguments, **CONSTANTS | others)


def triton_launch(function, arguments, **others):
    constants = CONSTANTS | others
    return JITFunction.run(function, *arguments, grid=(3, 2), warmup=False, **constants)


def test_each_launch_has_the_code_and_arguments_of_triton(device, double):
    assert isinstance(double, Kernel) and isinstance(double, JITFunction)
    codes = set()
    for arguments in ARGUMENTS.values():
        for others in ({}, {"BLOCK": 128}, {"FLAG": False}, {"num_warps": 8}):
            first, second = (launch(double, arguments, **others) for _ in range(2))
            assert first is second is triton_launch(double, arguments, **others)
            by_triton = device.launches.pop()
            assert same(by_triton, device.launches.pop()) and same(by_triton, device.launches.pop())
            codes.add(id(first))
    assert len(codes) == 4 * (len(ARGUMENTS) - 1)  # other values share the code of the first
    assert not device.launches


def same(first, second):
    """Return whether two launches are equal; tensors have to be the same objects."""
    *others, arguments = first
    *theirs, those = second
    return others == theirs and all(a is b or a == b for a, b in zip(arguments, those, strict=True))


@pytest.fixture
def by_triton(monkeypatch):
    """Return the list of the kernels that Triton itself launches."""
    kernels, run = [], JITFunction.run

    def counted(self, *args, **options):
        kernels.append(self)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    return kernels


@pytest.mark.parametrize(("is_tested", "launches"), [(True, 1), (False, 3)])
def test_a_tested_version_of_triton_makes_the_first_launch_only_and_another_one_all(
    device, double, by_triton, monkeypatch, is_tested, launches
):
    monkeypatch.setattr(_kernel, "IS_TESTED", is_tested)
    codes = [launch(double, ARGUMENTS[name]) for name in ("as before", "other values", "as before")]
    assert len(set(map(id, codes))) == 1 and len(device.launches) == 3
    assert by_triton == [double] * launches


def test_devices_have_their_own_code_and_stream(device, double):
    first = launch(double, ARGUMENTS["as before"])
    device.device = 1
    second = launch(double, ARGUMENTS["as before"])
    assert first is not second and launch(double, ARGUMENTS["as before"]) is second
    assert [stream for _, stream, *_ in device.launches] == [100, 101, 101]


def test_threads_share_a_kernel(device, double):
    codes = []

    def work():
        codes.extend(launch(double, ARGUMENTS["as before"]) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codes) == 200 == len(device.launches)
    assert len(set(map(id, codes))) <= 4  # as in Triton, several threads may compile at first
    assert launch(double, ARGUMENTS["as before"]) in codes and len(double.compiled) == 1
