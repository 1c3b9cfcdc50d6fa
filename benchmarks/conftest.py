"""Fixtures that record device, versions and results of benchmarks in the JSON and the terminal."""

import gc

import pytest
import torch

from benchmarks.cases import ON_GPU, SCALES
from benchmarks.machine import machine
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import no_gain

REPORTS = pytest.StashKey[list]()
PLANNED, PASSED, FAILED = (pytest.StashKey[list]() for _ in range(3))


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=10, help="interleaved rounds of a measurement")
    scales = parser.getgroup("scale of the benchmarks").addoption
    scales("--smallest", action="store_true", help="one small case of each benchmark")
    scales("--full", action="store_true", help="every case; the default takes at most ten minutes")


def pytest_configure(config):
    config.option.verbose = max(config.option.verbose, 1)  # a line for each case, as it runs


def scale_of(config):
    """Return the scale of the options."""
    chosen = [name for name in SCALES if config.getoption(f"--{name}", False)]
    if len(chosen) > 1:
        raise pytest.UsageError("expected --smallest or --full, got both; leave one out")
    return chosen[0] if chosen else "default"


def pytest_generate_tests(metafunc):
    marker, scale = metafunc.definition.get_closest_marker("cases"), scale_of(metafunc.config)
    for name, values in (marker.kwargs if marker is not None else {}).items():
        metafunc.parametrize(name, values(scale), ids=str)


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture
def scale(request):
    return scale_of(request.config)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _freed():
    """Free the models of a benchmark, gigabytes in the cycles of compiled and exported graphs.

    The collector counts objects, not bytes, and would keep those of several benchmarks.
    """
    yield
    gc.collect()


@pytest.fixture
def record(request, benchmark):
    """Return record(step, ratios=, ...), which stores facts and lets the runner time `step`."""

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
    """Round all numbers to five significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def pytest_collection_finish(session):
    session.config.stash[PLANNED] = [item.nodeid for item in session.items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed or report.when == "call":
        key = PASSED if report.passed else FAILED
        item.config.stash.setdefault(key, []).append(item.nodeid)
    return report


def pytest_benchmark_generate_machine_info(config):
    return machine()


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()
    commit_info.update(commit())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep our measurements and the runner's median, and list failed and missing benchmarks."""
    planned, passed, failed = (set(config.stash.get(k, [])) for k in (PLANNED, PASSED, FAILED))
    output_json["run"] = {
        "planned": len(planned),
        "failed": sorted(failed),
        "missing": sorted(planned - passed - failed),
    }
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
            f"{other} {ratio:.3f}{' no gain' if no_gain(ratio) else ''}"
            for other, ratio in facts["ratios"].items()
        )
        terminalreporter.write_line(f"{name}: {', '.join(verdicts)}")
