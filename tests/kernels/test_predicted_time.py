"""The inputs of the predicted time of a launch: its programs, its waits and its bytes."""

import sys

import pytest
import torch

from elip_kernels._triton import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is absent, so there is nothing to launch", allow_module_level=True)

from benchmarks.kernel_analysis import least_work, report
from benchmarks.kernel_analysis.latency import (
    LAUNCH,
    MACHINES,
    WAITS,
    LaunchSize,
    bound,
    modelled_waits,
    size_of,
    waves,
)
from elip_kernels.testing import WITH_KERNELS

BF16 = 257, "bf16"
GREEDY = {"_diverse_kernel": 167, "_dpp_kernel": 937}  # each step waits for the one before
SIXTEEN = {"_query_kernel", "_value_kernel"}  # sixteen images share a program


@pytest.mark.slow
def test_one_image_alone_fills_what_the_work_allows():
    """In bf16 for a ViT-B, the figures of docs/kernels.md."""
    by_batch = report.sizes(WITH_KERNELS, batches=(1, 32))
    alone = {name: sizes[1] for (name, N, dtype), sizes in by_batch.items() if (N, dtype) == BF16}
    modelled = {name: size for name, size in alone.items() if name in WAITS}
    many = {name for name, size in modelled.items() if size.programs >= 64}
    assert many == {"_cosines_kernel"}
    assert {name: modelled[name].waits for name in GREEDY} == GREEDY
    assert max(size.waits for name, size in modelled.items() if name not in GREEDY) == 11
    for (name, _, _), sizes in by_batch.items():
        if name in WAITS:
            images = 16 if name in SIXTEEN else 1
            assert sizes[32].programs == 32 // images * sizes[1].programs, name


def test_every_wait_model_is_of_a_kernel():
    modules = [module for name, module in sys.modules.items() if name.startswith("elip_kernels.")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels >= WAITS.keys()


def test_a_kernel_without_a_model_waits_once():
    assert modelled_waits("_new_kernel", {}) == 1


@pytest.mark.parametrize(
    ("op", "work"),
    [
        ("reduce", lambda *shape: least_work.reduce(*shape)),
        ("score_reduce", lambda *shape: least_work.score_reduce(*shape[:4], 12, shape[4])),
    ],
    ids=["reduce", "score_reduce"],
)
def test_the_bytes_of_a_launch_are_those_of_the_analytic_model(op, work):
    shape = (2, 257, 768, 166, torch.bfloat16)
    launches = report.recorded_call(op, 2, 257, 166, "bf16", 90)
    least = least_work.together(work(*shape), least_work.reduce_backward(*shape)).bytes
    assert sum(size_of(launch).bytes for launch in launches) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize(
    ("programs", "in_turns"), [(1, 1), (8 * 132, 1), (8 * 132 + 1, 2), (24 * 132, 3)]
)
def test_time_is_that_of_bytes_or_of_waits_in_turn(programs, in_turns):
    H100 = MACHINES[90]
    few, many = LaunchSize(programs, 5, 10), LaunchSize(programs, 5, 335_000_000)
    assert waves(few, 8, H100) == in_turns
    assert bound(few, 8, H100)[1] == pytest.approx(LAUNCH + in_turns * 5 * H100.latency)
    assert bound(many, 8, H100) == pytest.approx((1e-4, LAUNCH + 1e-4))
