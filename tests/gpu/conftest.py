"""Collected only where a CUDA or ROCm device is; elsewhere one line says so."""

from collections import Counter

import pytest
import torch

HAS_DEVICE = torch.cuda.is_available()

if not HAS_DEVICE:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    if not HAS_DEVICE:
        terminalreporter.write_line("tests/gpu: not collected, there is no CUDA or ROCm device")


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def launches(monkeypatch):
    """Counts the launches of this project's kernels by name."""
    from triton.runtime.jit import JITFunction

    counter, run = Counter(), JITFunction.run

    def counted(kernel, *args, **kwargs):
        if kernel.fn.__module__.startswith("elip_kernels."):
            counter[kernel.fn.__name__] += 1
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return counter
