"""Microseconds of Python for a call at batch 1, without the time of the device.

On a GPU, calls return before their kernels end. Elsewhere the kernels are compiled for sm_90, and a
stub of Triton's driver takes their launches, so this is the host's part without the driver's call.
"""

import time
from contextlib import nullcontext
from copy import deepcopy

import pytest
import timm
import torch

import elip_kernels
from benchmarks.cases import DEVICE, ON_GPU
from benchmarks.parity import OURS, parity
from elip_kernels._triton import HAS_TRITON
from elip_models import reduce_

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is absent, so nothing is launched")
N, D, HEADS, DEPTH, PIXELS = 197, 768, 12, 12, 64
REPEATS = 20
STRATEGIES = ("tome", "evit", "elip")


@pytest.fixture
def device():
    """The GPU, or a stub of one."""
    if ON_GPU or not HAS_TRITON:
        return nullcontext()
    from benchmarks.kernel_analysis.stub_device import stub_device

    return stub_device(keep=False)


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


def first(result):
    """Return the tokens or the row that a call returns, as the outputs that `parity` compares."""
    return (result if torch.is_tensor(result) else result[0],)


def random(like, *shape):
    return torch.rand(shape, device=like.device).to(like.dtype)


def reduce_call(tokens):
    scores = random(tokens, 1, N - 1)
    return lambda: elip_kernels.reduce(tokens, scores, 0.65)


def score_reduce_call(tokens):
    query, key = random(tokens, 2, D, D)
    bias, gamma, beta = random(tokens, 3, D)
    cls = tokens.detach()[:, 0]
    norm = {"norm_weight": gamma, "norm_bias": beta, "eps": 1e-6}
    projections = {"q_weight": query, "q_bias": bias, "k_weight": key, "num_heads": HEADS}
    return lambda: elip_kernels.score_reduce(tokens, cls, 0.65, **norm, **projections)


def bipartite_merge_call(tokens):
    metric = random(tokens, 1, N, 64)
    return lambda: elip_kernels.bipartite_merge(tokens, metric, 16)


def cls_attention_call(tokens):
    q, k = random(tokens, 1, HEADS, 64), random(tokens, 1, HEADS, N, 64)
    return lambda: elip_kernels.cls_attention(q, k)


OPS = {
    "reduce": reduce_call,
    "score_reduce": score_reduce_call,
    "bipartite_merge": bipartite_merge_call,
    "cls_attention": cls_attention_call,
}


def made(op, tokens):
    """Return a call of an op with the same random inputs each time."""
    torch.manual_seed(0)
    return OPS[op](tokens)


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_op(record, rounds, device, op):
    tokens = torch.rand(1, N, D, device=DEVICE)
    calls = {
        "no gradient": made(op, tokens),
        "gradient": made(op, tokens.clone().requires_grad_()),
    }
    exact = first(made(op, tokens.double())())
    outputs = {"PyTorch": pytorch_form(calls["no gradient"]), OURS: first(calls["gradient"]())}
    same = parity(exact, {name: [t.detach() for t in tensors] for name, tensors in outputs.items()})
    with device:
        times = microseconds(calls, rounds)
        ratios = {"no gradient": times["gradient"] / times["no gradient"]}
        facts = {"ratios": ratios, "host_microseconds": times, "shape": {"B": 1, "N": N, "D": D}}
        facts |= {"parity": same, "dtype": "fp32"}
        record(calls["gradient"], op=op, rounds=rounds, **facts)


def pytorch_form(call):
    with elip_kernels.use_pytorch_ops():
        return first(call())


@needs_triton
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_block(record, rounds, device, strategy):
    """Time added to a block of a dense tower; the tensors are so small that only Python counts."""
    sizes = {"embed_dim": 24, "num_heads": 3, "depth": DEPTH, "img_size": PIXELS}
    dense = timm.create_model("vit_tiny_patch16_224", **sizes).to(DEVICE).eval()
    reduced, wide = (reduce_(deepcopy(dense), strategy, keep=0.7) for _ in "ab")
    wide.double()
    images = torch.rand(1, 3, PIXELS, PIXELS, device=DEVICE)
    calls = {"dense": lambda: dense(images), strategy: lambda: reduced(images)}
    with torch.no_grad():
        outputs = {"PyTorch": pytorch_form(calls[strategy]), OURS: first(calls[strategy]())}
        same = parity(first(wide(images.double())), outputs)
        with device:
            times = microseconds(calls, rounds)
            ratios = {"dense": times[strategy] / times["dense"]}
            added = (times[strategy] - times["dense"]) / DEPTH
            facts = {"ratios": ratios, "host_microseconds": times, "added_to_a_block": added}
            facts |= {"parity": same, "dtype": "fp32"}
            record(calls[strategy], strategy=strategy, rounds=rounds, **facts)
