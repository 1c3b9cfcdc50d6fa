"""Waits of a program for memory, counted in the interpreter."""

from itertools import chain

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernel_analysis.__main__ import waits_of
from benchmarks.kernel_analysis.waits import counted_waits
from elip_kernels.testing import WITH_KERNELS


@pytest.mark.slow
def test_the_waits_of_one_image_are_those_of_the_docs():
    """In bf16 for a ViT-B, the figures of docs/kernels.md; each greedy step waits for the last."""
    launches = [waits_of(op, "bf16").partition(": ")[2].split(", ") for op in WITH_KERNELS]
    waits = {}
    for launch in chain.from_iterable(launches):
        kernel, count = launch.split()
        waits[kernel] = max(int(count), waits.get(kernel, 0))
    greedy = {"_diverse_kernel": 167, "_dpp_kernel": 937}
    assert {name: waits.pop(name) for name in greedy} == greedy
    assert max(waits.values()) == 11


@triton.jit
def _follow_kernel(x_ptr, out_ptr, N, FOLLOWS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    here = tl.load(x_ptr + offs, mask=offs < N, other=0)
    there = tl.load(x_ptr + (here if FOLLOWS else offs + 1), mask=offs < N - 1, other=0)
    tl.load(x_ptr + here + there, mask=offs < 0)  # no lane is active
    tl.store(out_ptr + offs, here + there, mask=offs < N)


@triton.jit
def _loop_kernel(
    x_ptr, out_ptr, N,
    AHEAD: tl.constexpr, MULTIPLY: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    x = tl.load(x_ptr + offs)
    for n in tl.range(0, N, num_stages=STAGES):
        now = tl.load(x_ptr + n + offs)
        if AHEAD:
            now, x = x, now
        acc += tl.dot(now, now) if MULTIPLY else now
        if BESIDE:
            acc += tl.load(x_ptr + n + 1 + offs)
    if tl.sum(tl.sum(acc, 1), 0) > 0:
        acc += tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, acc)


@pytest.mark.parametrize(("follows", "waits"), [(False, 1), (True, 2)])
def test_a_load_from_a_loaded_address_is_another_wait(follows, waits):
    x = torch.arange(16, dtype=torch.int32)
    with counted_waits() as seen:
        _follow_kernel[(2,)](x, torch.zeros_like(x), 15, FOLLOWS=follows, BLOCK=16)
    assert (seen[0].kernel, seen[0].waits) == ("_follow_kernel", waits)


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, 9 + 1),
        ({"AHEAD": True}, 5 + 1),  # two tiles are in flight
        ({"MULTIPLY": True}, 5 + 1),
        ({"MULTIPLY": True, "BESIDE": True}, 2 + 8 + 1),  # loads that feed no product wait
    ],
    ids=str,
)
def test_a_loop_waits_in_every_trip_unless_it_is_pipelined(options, waits):
    options = {"AHEAD": False, "MULTIPLY": False, "BESIDE": False, "STAGES": None} | options
    with counted_waits() as seen:
        _loop_kernel[(1,)](torch.ones(300), torch.zeros(256), 9, BLOCK=16, **options)
    assert seen[0].waits == waits
    assert "range" not in globals()  # restored
