"""Overhead of public calls (checks and dispatch) over the body of their op, in microseconds."""

from statistics import median

import pytest
import torch

import elip_kernels
from benchmarks.cases import DEVICE, ON_GPU
from benchmarks.parity import OURS, parity
from elip_kernels._operator import OPERATORS
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side

SHAPE = {"B": 1, "N": 17, "D": 16}  # so small that the overhead is visible


def body_of(name):
    """Return the function that the op runs on this device."""
    return OPERATORS[name].on_device if ON_GPU else OPERATORS[name].reference


def reduce_calls():
    tokens = torch.randn(*SHAPE.values(), device=DEVICE)
    scores = torch.rand(1, 16, device=DEVICE)
    body = body_of("reduce")
    return {
        "body": lambda: body(tokens, scores, None, 8, 1, True, True)[0],
        OURS: lambda: elip_kernels.reduce(tokens, scores, 8),
    }


def cls_attention_calls():
    q, k = torch.randn(1, 2, 8, device=DEVICE), torch.randn(1, 2, 17, 8, device=DEVICE)
    body = body_of("cls_attention")
    return {
        "body": lambda: body(q, k, None, 8**-0.5),
        OURS: lambda: elip_kernels.cls_attention(q, k),
    }


OPS = {"reduce": reduce_calls, "cls_attention": cls_attention_calls}


@pytest.mark.parametrize("op", OPS)
def test_overhead(record, rounds, op):
    calls = OPS[op]()
    exact = (calls["body"]().double(),)
    checked = parity(exact, {name: (call(),) for name, call in calls.items()})
    times = time_side_by_side(calls, device=torch.device("cpu"), rounds=rounds)
    added = [ours - body for ours, body in zip(times[OURS], times["body"], strict=True)]
    record(
        calls[OURS],
        op=op,
        rounds=rounds,
        ratios={"body": ratios_to("body", times)[OURS]},
        milliseconds=milliseconds(times),
        overhead_microseconds=1e6 * median(added),
        shape=SHAPE,
        dtype="fp32",
        parity=checked,
    )
