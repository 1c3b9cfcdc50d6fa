"""Waits of a program for memory: counted in the interpreter against those of `latency.py`."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernel_analysis.latency import modelled_waits
from benchmarks.kernel_analysis.waits import counted_waits
from elip_kernels import launch
from tests.interpreted.test_traffic import OPS, SMALL, bf16, fp32

CASES = [*SMALL[1::2], pytest.param((1, 150, 330, 60, bf16), marks=pytest.mark.slow)]


def check(op, case, **options):
    """Check that modelled and counted waits agree; return the names of the kernels."""
    with counted_waits() as launches:
        OPS[op][0](*case, **options)
    for launched in launches:
        stated = [
            modelled_waits(launched.kernel, launched.arguments, held)
            for held in held_by_program(launched)
        ]
        assert max(stated) == launched.waits, launched.kernel
    return {launched.kernel for launched in launches}


def held_by_program(launched):
    """Return how many tokens each row of each program of a merge contains."""
    if launched.kernel != "_merge_fwd_kernel":
        return [None]
    arguments = launched.arguments
    held = arguments["starts_ptr"].diff(
        dim=1, append=torch.full((len(arguments["starts_ptr"]), 1), arguments["N"])
    )
    return [rows.tolist() for image in held for rows in image.split(arguments["BLOCK_R"])]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_waits_are_as_stated(launches, op, case):
    check(op, case)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("reduce", {"masked": True, "num_prefix_tokens": 0}),
        ("received", {"masked": True}),
        ("received", {"group": 1}),
        *(("generic_row", {"group": group}) for group in (2, 3, 4, 7)),
        ("reduce", {"merge": False, "num_prefix_tokens": 3}),
        ("score_reduce", {"has_text": True}),
        ("score_reduce", {"merge": False}),
        ("bipartite", {"has_penalty": True, "has_size": False}),
        ("nearest", {"has_size": False}),
        ("diverse", {"masked": True}),
        ("diverse", {"starts": True}),
        ("dpp", {"masked": True}),
        ("dpp", {"weighed": False}),
    ],
    ids=str,
)
def test_waits_of_options(launches, op, options):
    check(op, (2, 21, 70, 8, fp32), **options)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"merge": False}], ids=str)
def test_waits_of_many_tokens(launches, monkeypatch, options):
    for name in ("MAX_MOVED", "MAX_SELECTED", "TILE"):
        monkeypatch.setattr(launch, name, 64)
    assert "_stream_kernel" in check("reduce", (1, 150, 40, 60, bf16), **options)
    if not options:
        assert "_slots_of_kernel" in check("bipartite", (1, 150, 40, 60, bf16))


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
        ({"MULTIPLY": True, "num_stages": 1}, 9 + 1),
        ({"MULTIPLY": True, "num_stages": 4}, 3 + 1),
        ({"MULTIPLY": True, "BESIDE": True}, 2 + 8 + 1),  # loads that feed no product wait
        ({"BESIDE": True, "STAGES": 4}, 3 + 1),  # a loop with its own num_stages
        ({"STAGES": 1}, 9 + 1),
    ],
    ids=str,
)
def test_a_loop_waits_in_every_trip_unless_it_is_pipelined(options, waits):
    options = {"AHEAD": False, "MULTIPLY": False, "BESIDE": False, "STAGES": None} | options
    with counted_waits() as seen:
        _loop_kernel[(1,)](torch.ones(300), torch.zeros(256), 9, BLOCK=16, **options)
    assert seen[0].waits == waits
    assert "range" not in globals()  # restored
