"""Device, versions and results of every benchmark: into the JSON, and as a table at the end."""

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import cpuinfo
import pytest
import torch

from benchmarks.cases import DEVICE, ON_GPU
from elip_models.profile import NO_GAIN

REPORTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=10, help="interleaved rounds of a measurement")


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def record(request, benchmark):
    """record(step, ratios=, ...): store what was measured; the runner times `step` by itself."""

    def synchronized(step):
        step()
        if ON_GPU:
            torch.cuda.synchronize()

    def store(step, **facts):
        benchmark.extra_info |= rounded(facts) | machine()
        request.config.stash.setdefault(REPORTS, []).append((request.node.name, facts))
        benchmark.pedantic(synchronized, (step,), rounds=3)

    return store


def rounded(value):
    """Five significant digits are more than a measurement has."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


@cache
def machine():
    """Device and versions: all that is said of the machine."""
    cpu = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    return {
        "device": torch.cuda.get_device_name(DEVICE)
        if ON_GPU
        else f"{cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "triton", "timm")},
    }


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def pytest_benchmark_generate_machine_info(config):
    return machine()


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in commit_info.keys() - {"id", "dirty"}:
        del commit_info[name]


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep what was measured side by side; the runner's own figures only in short."""
    output_json["benchmarks"] = [
        {
            "name": entry["name"],
            "stats": {name: entry["stats"][name] for name in ("median", "rounds")},
            "extra_info": entry["extra_info"],
        }
        for entry in output_json["benchmarks"]
    ]


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(REPORTS, [])
    if rows:
        terminalreporter.section("time ratios, side by side in this run")
    for name, facts in rows:
        verdicts = (
            f"{other} {ratio:.3f}{' no gain' if ratio > NO_GAIN else ''}"
            for other, ratio in facts["ratios"].items()
        )
        terminalreporter.write_line(f"{name}: {', '.join(verdicts)}")
