"""Device, versions and ratios of every benchmark: into the JSON, and as a table at the end."""

import platform

import pytest
import torch

from elip_models.profile import NO_GAIN

REPORTS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def device():
    """The accelerator, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def report(request, benchmark, device):
    """report(ratios, **facts): store the ratios to the baseline with what they were measured on."""

    def store(ratios, **facts):
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
        benchmark.extra_info |= {
            "ratios": ratios,
            "device": name or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **facts,
        }
        request.config.stash.setdefault(REPORTS, []).append((request.node.name, ratios))

    return store


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(REPORTS, [])
    if rows:
        terminalreporter.section("ratios to the baseline, side by side in this run")
    for name, ratios in rows:
        terminalreporter.write_line(name)
        for label, ratio in ratios.items():
            verdict = "  no gain" if ratio > NO_GAIN and ratio != 1.0 else ""
            terminalreporter.write_line(f"  {label:<32}{ratio:8.3f}{verdict}")
