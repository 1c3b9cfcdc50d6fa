"""Microseconds of the host for an eager call of an op at batch 1.

On a GPU, calls return before their kernels end. Elsewhere the kernels are compiled for sm_90, and a
stub of Triton's driver takes their launches, so this is the host's part without the driver's call.
"""

import time
from contextlib import nullcontext

import pytest
import torch

import elip_kernels
from benchmarks.cases import DEVICE, ON_GPU
from benchmarks.parity import OURS, parity
from elip_kernels._triton import HAS_TRITON

N, D, REPEATS = 197, 768, 20


def microseconds(calls, rounds):
    """Return the processor time of each call: its fastest round, as other work only adds to it."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(2 * rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(REPEATS):
                call()
            best[name] = min(best[name], 1e6 * (time.process_time() - start) / REPEATS)
            if ON_GPU:
                torch.cuda.synchronize()
    return best


@pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so nothing is launched")
def test_reduce(record, rounds):
    from benchmarks.kernel_analysis.stub_device import stub_device

    tokens, scores = torch.rand(1, N, D, device=DEVICE), torch.rand(1, N - 1, device=DEVICE)
    leaf = tokens.clone().requires_grad_()
    calls = {
        "no gradient": lambda: elip_kernels.reduce(tokens, scores, 0.65),
        "gradient": lambda: elip_kernels.reduce(leaf, scores, 0.65),
    }
    exact = (elip_kernels.reduce(tokens.double(), scores.double(), 0.65),)
    with elip_kernels.use_pytorch_ops():
        outputs = {"PyTorch": (calls["no gradient"](),)}
    outputs[OURS] = (calls["gradient"]().detach(),)
    facts = {"parity": parity(exact, outputs), "dtype": "fp32", "shape": {"B": 1, "N": N, "D": D}}
    with nullcontext() if ON_GPU else stub_device(keep=False):
        times = microseconds(calls, rounds)
        ratios = {"no gradient": times["gradient"] / times["no gradient"]}
        facts |= {"op": "reduce", "ratios": ratios, "host_microseconds": times}
        record(calls["gradient"], rounds=rounds, **facts)
