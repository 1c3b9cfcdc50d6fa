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
    size_of,
    waves,
)
from elip_kernels.testing.calls import CALLS

ALONE = {  # programs and waits of one image, N = 257 of a ViT-B in bf16
    "_reduce_fwd_kernel": (12, 2),
    "_reduce_bwd_kernel": (54, 2),
    "_query_kernel": (12, 11),
    "scores_kernel": (4, 4),
    "_score_select_kernel": (1, 3),
    "_move_kernel": (12, 5),
    "_keys_kernel": (48, 1),
    "_row_kernel": (1, 3),
    "_lse_kernel": (60, 5),
    "_sums_kernel": (60, 5),
    "_mean_kernel": (2, 3),
    "_weights_kernel": (4, 6),
    "_weigh_kernel": (12, 3),
    "_value_kernel": (12, 4),
    "_match_kernel": (5, 5),
    "_slots_kernel": (1, 1),
    "_order_kernel": (17, 2),
    "_merge_fwd_kernel": (33, 4),
    "_merge_bwd_kernel": (54, 2),
    "_select_kernel": (1, 1),
    "_nearest_kernel": (9, 7),
    "_cosines_kernel": (81, 6),
    "_diverse_kernel": (1, 167),
    "_dpp_kernel": (1, 937),
}
GREEDY = {"_diverse_kernel", "_dpp_kernel"}  # each step waits for the one before
SIXTEEN = {"_query_kernel", "_value_kernel"}  # sixteen images share a program


@pytest.mark.slow
def test_one_image_alone_fills_what_the_work_allows():
    """Only the cosines of all pairs start 64 programs for one image."""
    found = report.sizes(CALLS, batches=(1, 32))
    alone = {name: of[1] for (name, N, dtype), of in found.items() if (N, dtype) == (257, "bf16")}
    assert {name: (size.programs, size.waits) for name, size in alone.items()} == ALONE
    assert max(size.waits for name, size in alone.items() if name not in GREEDY) <= 16
    for (name, _, _), of in found.items():
        most = 16 if name in SIXTEEN else 1
        assert of[32].programs == 32 // most * of[1].programs, name


def test_every_kernel_has_a_wait_model():
    modules = [module for name, module in sys.modules.items() if name.startswith("elip_kernels.")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == WAITS.keys()


@pytest.mark.parametrize(
    ("call", "work"),
    [
        ("reduce", lambda *shape: least_work.reduce(*shape)),
        ("score_reduce", lambda *shape: least_work.score_reduce(*shape[:4], 12, shape[4])),
    ],
    ids=["reduce", "score_reduce"],
)
def test_the_bytes_of_a_launch_are_those_of_the_analytic_model(call, work):
    shape = (2, 257, 768, 166, torch.bfloat16)
    launches = report.recorded_call(call, 2, 257, 166, "bf16", 90)
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
