"""Memory traffic of the kernels: bytes counted in the interpreter against the analytic model."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import FlopCounterMode

import elip_kernels
from benchmarks.kernel_analysis import least_work
from benchmarks.kernel_analysis.traffic import traffic
from elip_kernels.testing import Case
from tests.interpreted.absorbed import block
from tests.interpreted.test_bipartite_kernel import inputs

H, C = 3, 40  # heads; channels of the metric


def run_reduce(B, N, D, K, dtype):
    tokens, scores = Case(B, N, D, K, dtype, 1).inputs()
    elip_kernels.reduce(tokens.requires_grad_(), scores, K).sum().backward()


def reduce_works(*case):
    return [least_work.reduce(*case), least_work.reduce_backward(*case)]


def absorbed(B, N, D, dtype, **more):
    """Return arguments of the absorbed ops."""
    tokens, cls = torch.randn(B, N, D).to(dtype).requires_grad_(), torch.randn(B, D).to(dtype)
    return {"tokens": tokens, "cls": cls} | block(D, H, dtype) | more


def run_score_reduce(B, N, D, K, dtype):
    elip_kernels.score_reduce(**absorbed(B, N, D, dtype, keep=K)).sum().backward()


VECTORS = {"norm_weight", "norm_bias", "q_bias", "v_bias"}  # not in the model


def query_work(B, D, dtype, **options):
    return least_work.query(B, D, H, dtype, width=H * 8, **options)


def score_reduce_works(B, N, D, K, dtype):
    return [
        query_work(B, D, dtype),
        least_work.score_tiles(B, N, D, H, dtype),
        least_work.select_row(B, N, D, K, H, dtype),
        least_work.move(B, N, D, K, dtype),
        least_work.reduce_backward(B, N, D, K, dtype),
    ]


def run_row_from_tokens(B, N, D, K, dtype):
    elip_kernels.cls_attention_from_tokens(**absorbed(B, N, D, dtype))


def row_from_tokens_works(B, N, D, K, dtype):
    tiles = least_work.score_tiles(B, N, D, H, dtype)
    return [query_work(B, D, dtype), tiles, least_work.row(B, N, D, H, dtype)]


def run_attend(B, N, D, K, dtype):
    value = {"v_weight": torch.randn(H * 8, D), "v_bias": torch.randn(H * 8)}
    value = {name: v.to(dtype) for name, v in value.items()}
    elip_kernels.cls_attention_output(**absorbed(B, N, D, dtype, **value))


def attend_works(B, N, D, K, dtype):
    works = [work(B, N, D, H, dtype) for work in (least_work.weights, least_work.weigh)]
    works.append(least_work.value(B, N, D, H, dtype, width=H * 8))
    return [query_work(B, D, dtype, normed=True), *works]


def run_generic_row(B, N, D, K, dtype):
    q, k = torch.randn(B, 3, D // 3 + 1), torch.randn(B, 3, N, D // 3 + 1)
    elip_kernels.cls_attention(q.to(dtype), k.to(dtype))


def generic_row_works(B, N, D, K, dtype):
    first = least_work.key_scores(B, 3, N, D // 3 + 1, dtype, group=1)
    return [first, least_work.row_of_keys(B, 3, N)]


def run_received(B, N, D, K, dtype):
    """Run K queries of two heads for each head of N keys."""
    q, k = torch.randn(B, 6, K, D // 12 + 1), torch.randn(B, 3, N, D // 12 + 1)
    elip_kernels.attention_column_mean(q.to(dtype), k.to(dtype))


def received_works(B, N, D, K, dtype):
    shape = (B, 6, 3, K, N, D // 12 + 1, dtype)
    sums = [least_work.query_sums(*shape), least_work.key_sums(*shape)]
    return [*sums, least_work.column_mean(B, 3, N)]


def run_bipartite(B, N, D, K, dtype):
    tokens, metric, size = inputs(B, N, D, C, dtype)
    out, _ = elip_kernels.bipartite_merge(tokens.requires_grad_(), metric, K, size=size)
    out.sum().backward()


def bipartite_works(B, N, D, K, dtype):
    r = min(K, (N - 1) // 2)
    return [
        least_work.bipartite_match(B, N, C, dtype),
        least_work.bipartite_slots(B, N),
        *merge_works(B, N, D, N - r, dtype),
    ]


def merge_works(B, N, D, R, dtype):
    """Return the work of forward and backward for known slots."""
    return [
        least_work.merge_order(B, N, R, has_size=True),
        least_work.merge_gather(B, N, D, R, dtype, has_size=True),
        least_work.bipartite_merge_backward(B, N, D, N - R, dtype, has_size=True),
    ]


def run_nearest(B, N, D, K, dtype):
    tokens, metric, size = inputs(B, N, D, C, dtype)
    kept = elip_kernels.select_tokens(torch.rand(B, N), K)
    out, _ = elip_kernels.merge_nearest(tokens.requires_grad_(), kept, metric, size=size)
    out.sum().backward()


def nearest_works(B, N, D, K, dtype):
    return [
        least_work.select(B, N, K),
        least_work.nearest_match(B, N, C, K, dtype),
        *merge_works(B, N, D, 1 + K, dtype),
    ]


def run_diverse(B, N, D, K, dtype):
    elip_kernels.select_diverse(torch.randn(B, N, D).to(dtype), K)


def diverse_works(B, N, D, K, dtype):
    cosines = least_work.cosines(B, N, D, dtype, has_nearest=True)
    return [cosines, least_work.diverse(B, N, D, K, dtype)]


def run_dpp(B, N, D, K, dtype):
    elip_kernels.select_dpp(torch.randn(B, N, D).to(dtype), K, relevance=torch.rand(B, N))


def dpp_works(B, N, D, K, dtype):
    cosines = least_work.cosines(B, N, D, dtype)
    return [cosines, least_work.dpp(B, N, K, has_relevance=True)]


OPS = {
    "reduce": (run_reduce, reduce_works),
    "generic_row": (run_generic_row, generic_row_works),
    "received": (run_received, received_works),
    "attend": (run_attend, attend_works),
    "bipartite": (run_bipartite, bipartite_works),
    "nearest": (run_nearest, nearest_works),
    "score_reduce": (run_score_reduce, score_reduce_works),
    "row_from_tokens": (run_row_from_tokens, row_from_tokens_works),
    "diverse": (run_diverse, diverse_works),
    "dpp": (run_dpp, dpp_works),
}


@pytest.mark.parametrize("op", OPS)
def test_each_byte_moves_once(launches, op):
    run, works = OPS[op]
    case = (2, 67, 130, 63, torch.bfloat16)
    with traffic() as launched:
        run(*case)
    for kernel, work in zip(launched, works(*case), strict=True):
        read = {name: access.unique for name, access in kernel.loads.items()}
        assert {name: n for name, n in read.items() if name not in VECTORS} == work.read
        assert {name: access.unique for name, access in kernel.stores.items()} == work.written
        assert {name: access.requested for name, access in kernel.stores.items()} == work.written


def flops(op, *case):
    """Return the FLOPs that PyTorch counts for the ops of a call."""
    with FlopCounterMode(display=False) as counter:
        OPS[op][0](*case)
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "elip" in str(op))


@pytest.mark.parametrize("op", OPS)
def test_operations_are_those_of_the_flop_formulas(op):
    case = (2, 21, 36, 8, torch.float32)
    counted = flops(op, *case)
    assert sum(work.operations for work in OPS[op][1](*case)) == counted
    assert counted > 0


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, TOO_MANY: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N + TOO_MANY)
    tl.store(out_ptr + offs, x, mask=offs < N)


def test_an_off_by_one_mask_is_found():
    memory = torch.zeros(100)
    x, out = memory[10:29], memory[50:69]
    where = "_copy_kernel: load of 1 lanes outside every tensor, the first 76 bytes after the .* x"
    with traffic(), pytest.raises(IndexError, match=where):
        _copy_kernel[(1,)](x, out, 19, TOO_MANY=1, BLOCK=32)
    _copy_kernel[(1,)](x, out, 19, TOO_MANY=1, BLOCK=32)  # no error without traffic()
