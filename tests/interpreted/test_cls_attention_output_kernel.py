"""The kernels of cls_attention_output in the interpreter, against PyTorch in fp64."""

from itertools import cycle

import pytest
import torch

import elip_kernels
from elip_kernels import launch
from elip_kernels.ops.absorbed_query import QueryArguments
from elip_kernels.ops.cls_attention_output import means_reference, weighted_means
from tests.interpreted.absorbed import BUDGET

SHAPES = [  # B, N, D, H, d
    (2, 197, 192, 3, 64),
    (1, 257, 40, 4, 32),
    (1, 50, 33, 3, 32),
    (2, 2, 32, 1, 32),
    (2, 17, 100, 5, 48),
    (1, 20, 96, 24, 32),
]
NAME = "elip::cls_attention_output"


def block(D, H, d, dtype):
    """Return random arguments of a pre-norm block."""

    def random(*shape):
        return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)

    matrices = {f"{name}_weight": random(H * d, D) for name in "qkv"}
    biases = {"q_bias": random(H * d), "v_bias": random(H * d)}
    norm = {"norm_weight": 1 + random(D), "norm_bias": random(D)}
    return norm | matrices | biases | {"num_heads": H, "eps": 1e-6}


def tokens_and_cls(B, N, D, dtype, offset=0.0):
    return (offset + torch.randn(B, N, D)).to(dtype), torch.randn(B, D).to(dtype)


def wide(arguments):
    return {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def in_fp64(tokens, cls, arguments):
    return elip_kernels.cls_attention_output(tokens.double(), cls.double(), **wide(arguments))


def error(got, exact):
    """Return the largest error over the largest entry."""
    return ((got - exact).abs().max() / exact.abs().max()).item()


def rounded_budget(dtype):
    """Return a budget of one ulp: the interpreter truncates to bf16 where hardware rounds."""
    ulp = torch.finfo(dtype).eps
    return BUDGET[dtype] + {torch.float32: 0.0, torch.float16: ulp / 2, torch.bfloat16: ulp}[dtype]


@pytest.mark.parametrize(("shape", "dtype"), zip(SHAPES, cycle(BUDGET), strict=False), ids=str)
def test_output_agrees_with_fp64(launches, poisoned_memory, shape, dtype):
    B, N, D, H, d = shape
    (tokens, cls), arguments = tokens_and_cls(B, N, D, dtype), block(D, H, d, dtype)
    got = elip_kernels.cls_attention_output(tokens, cls, **arguments)
    assert launches[NAME] == 1
    assert got.dtype == dtype
    assert error(got, in_fp64(tokens, cls, arguments)) <= rounded_budget(dtype)


def query_of(cls, key, eps=1e-6):
    """Return a query for heads of one channel, with query 1 and these keys."""
    q_weight, q_bias = torch.zeros_like(key), key.new_ones(len(key))
    return QueryArguments(
        *(cls, None, 1.0, False, None, None, eps, q_weight, q_bias, key, len(key), 1.0)
    )


def means(tokens, cls, key, eps=1e-6):
    """Return m in fp32, from which the kernels compute the output; it is not rounded."""
    assert launch.unsupported(tokens, cls, key) is None
    return weighted_means(tokens, query_of(cls, key, eps)).sum(1)


def exact_means(tokens, cls, key, eps=1e-6):
    return means_reference(tokens.double(), query_of(cls.double(), key.double(), eps))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_a_mean_far_from_zero_is_taken_out_again(dtype):
    tokens, cls = tokens_and_cls(2, 40, 64, dtype, offset=30.0)
    key = torch.randn(4, 64) / 8
    got = means(tokens, cls.float(), key)
    z = torch.nn.functional.layer_norm(tokens, (64,), eps=1e-6)
    z[:, 0] = torch.nn.functional.layer_norm(cls, (64,), eps=1e-6)
    eager = (key.to(dtype) @ z.mT).softmax(-1) @ z
    exact = exact_means(tokens, cls, key)
    assert error(got, exact) <= max(2 * error(eager, exact), BUDGET[dtype])


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_zero_token_and_an_eps_beyond_half_precision(dtype):
    """1 / sqrt(eps) exceeds the range of fp16; a merged token without mass is zero."""
    tokens, cls = tokens_and_cls(1, 20, 64, dtype)
    tokens[:, [3, 19]] = 0.0
    key = torch.randn(4, 64) / 8
    got = means(tokens, cls.float(), key, 1e-12)
    exact = exact_means(tokens, cls, key, 1e-12)
    assert error(got, exact) <= BUDGET[dtype]


def test_many_tokens_are_summed_in_parts(launches, poisoned_memory, monkeypatch):
    """There are three parts of five tiles; the last part has one tile."""
    dtype = torch.bfloat16
    monkeypatch.setattr(launch, "PART", 128)
    (tokens, cls), arguments = tokens_and_cls(2, 290, 33, dtype), block(33, 18, 8, dtype)
    got = elip_kernels.cls_attention_output(tokens, cls, **arguments)
    assert launches[NAME] == 1
    assert error(got, in_fp64(tokens, cls, arguments)) <= rounded_budget(dtype)


def test_the_values_weights_are_rows_of_a_larger_matrix(launches, poisoned_memory):
    """As in fused projections; a transposed matrix is copied."""
    tokens, cls = tokens_and_cls(2, 9, 32, torch.float32)
    arguments = block(32, 2, 16, torch.float32)
    weight, expected = arguments["v_weight"], in_fp64(tokens, cls, arguments)
    for v_weight in (torch.cat([weight, weight], 1)[:, 32:], weight.mT.contiguous().mT):
        got = elip_kernels.cls_attention_output(tokens, cls, **arguments | {"v_weight": v_weight})
        assert error(got, expected) <= BUDGET[torch.float32]
    assert launches[NAME] == 2  # fp64 runs PyTorch
