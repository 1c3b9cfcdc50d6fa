"""Run on a CUDA or ROCm device, or with TRITON_INTERPRET=1 on a CPU with small cases.

tests/kernels/test_gpu_on_cpu.py runs the second in a process. Otherwise nothing is collected, and
the summary says why.
"""

from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from elip_kernels import launch
from tests.gpu.ops import IS_INTERPRETED, ON_GPU

RUNS = ON_GPU or IS_INTERPRETED
NEEDS = {"test_tower.py": "timm", "test_benchmarks.py": "cpuinfo"}
ABSENT = {file: package for file, package in NEEDS.items() if find_spec(package) is None}

collect_ignore = list(ABSENT)
collect_ignore_glob = [] if RUNS else ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    for file, package in ABSENT.items():
        terminalreporter.write_line(f"tests/gpu/{file}: not collected, {package} is absent")
    if not RUNS:
        terminalreporter.write_line(
            "tests/gpu: not collected, there is no CUDA or ROCm device; "
            "TRITON_INTERPRET=1 runs small cases on a CPU"
        )


@pytest.fixture(scope="session", autouse=True)
def _kernels_and_cuda():
    """On a CPU, run the kernels in the interpreter and replace `torch.cuda`."""
    if ON_GPU:
        yield
        return
    from elip_kernels.testing import kernels_on_cpu
    from tests.gpu.fake_cuda import fake_cuda, guarded_launches

    with kernels_on_cpu(), fake_cuda(), guarded_launches():
        yield


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


@pytest.fixture
def launches(monkeypatch):
    """Count the launches of this project's kernels by name."""
    counter, run = Counter(), launch.run

    def counted(kernel, *args, **settings):
        counter[kernel.fn.__name__] += 1
        run(kernel, *args, **settings)

    monkeypatch.setattr(launch, "run", counted)
    return counter
