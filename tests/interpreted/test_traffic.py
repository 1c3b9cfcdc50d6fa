"""Memory traffic of the kernels: bytes counted in the interpreter against the analytic model."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import FlopCounterMode

import elip_kernels
from benchmarks.kernel_analysis import least_work
from benchmarks.kernel_analysis.least_work import Work
from benchmarks.kernel_analysis.traffic import Access, moved_over_distinct, traffic
from elip_kernels import launch
from elip_kernels._example import EXAMPLES, Sizes
from elip_kernels.testing import WITH_KERNELS, Case, kernels_on_cpu
from tests.interpreted.absorbed import block
from tests.interpreted.test_bipartite_kernel import inputs

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
SMALL = [(2, 38, 40, 1, fp32), (2, 67, 130, 63, bf16), (3, 18, 1, 9, fp16), (1, 4, 33, 1, bf16)]
MOST = 1.05
SHARED = {
    "scores_kernel": 1.26,
    "_weights_kernel": 1.26,
    "_weigh_kernel": 1.33,
    "_lse_kernel": 2.97,
    "_sums_kernel": 3.02,
    "_match_kernel": 2.91,
    "_nearest_kernel": 6.13,
    "_order_kernel": 8.47,
    "_merge_bwd_kernel": 1.25,
    "_cosines_kernel": 10.6,
}
"""Bytes that programs access over the distinct ones: at most `MOST` unless they share tensors."""
H, C = 3, 40  # heads; channels of the metric


def run_reduce(B, N, D, K, dtype, masked=False, **options):
    tokens, scores = Case(B, N, D, K, dtype, options.get("num_prefix_tokens", 1)).inputs()
    mask = torch.rand(B, N) > 0.3 if masked else None
    out = elip_kernels.reduce(tokens.requires_grad_(), scores, K, mask=mask, **options)
    out.sum().backward()


def reduce_works(*case, masked=False, **options):
    forward, backward = (
        least_work.reduce(*case, **options),
        least_work.reduce_backward(*case, **options),
    )
    if masked:
        forward.read["mask"] = case[0] * (case[1] - options.get("num_prefix_tokens", 1))
    if case[1] <= launch.MAX_MOVED:
        return [forward, backward]
    selected = {n: v for n, v in forward.written.items() if n != "out"}
    names = {"scores": "scores", "mask": "real"}
    first = Work({names[n]: v for n, v in forward.read.items() if n in names}, selected, 0)
    return [first, least_work.move(*case, **options), backward]


def absorbed(B, N, D, dtype, **more):
    """Return arguments of the absorbed ops."""
    tokens, cls = torch.randn(B, N, D).to(dtype).requires_grad_(), torch.randn(B, D).to(dtype)
    return {"tokens": tokens, "cls": cls} | block(D, H, dtype) | more


def run_score_reduce(B, N, D, K, dtype, has_text=False, **options):
    if has_text:
        options |= {"text": torch.randn(B, D).to(dtype), "fusion": 0.8}
    out = elip_kernels.score_reduce(**absorbed(B, N, D, dtype, keep=K, **options))
    out.sum().backward()


VECTORS = {"norm_weight", "norm_bias", "q_bias", "v_bias"}  # not in the model


def query_work(B, D, dtype, **options):
    return least_work.query(B, D, H, dtype, width=H * 8, **options)


def selection_works(B, N, D, K, dtype):
    """Return the work of one launch, or of the row and then its selection."""
    at_once = least_work.select_row(B, N, D, K, H, dtype)
    if N - 1 <= launch.MAX_SELECTED:
        return [at_once]
    row, written = least_work.row(B, N, D, H, dtype), dict(at_once.written)
    del written["row"]
    return [row, Work({"scores": B * (N - 1) * 4}, written, 0)]


def score_reduce_works(B, N, D, K, dtype, merge=True, has_text=False):
    return [
        query_work(B, D, dtype, has_text=has_text),
        least_work.score_tiles(B, N, D, H, dtype),
        *selection_works(B, N, D, K, dtype),
        least_work.move(B, N, D, K, dtype, merge=merge),
        least_work.reduce_backward(B, N, D, K, dtype, merge=merge),
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


def run_generic_row(B, N, D, K, dtype, group=1):
    q, k = torch.randn(B, 3 * group, D // 3 + 1), torch.randn(B, 3, N, D // 3 + 1)
    elip_kernels.cls_attention(q.to(dtype), k.to(dtype))


def generic_row_works(B, N, D, K, dtype, group=1):
    heads, width = 3 * group, D // 3 + 1
    first = least_work.key_scores(B, heads, N, width, dtype, group=group)
    return [first, least_work.row_of_keys(B, heads, N)]


def run_received(B, N, D, K, dtype, group=2, masked=False):
    """Run K queries on N keys, of which the mask leaves the first K."""
    q, k = torch.randn(B, 3 * group, K, D // 12 + 1), torch.randn(B, 3, N, D // 12 + 1)
    masks = (torch.arange(N) < K).expand(B, -1), torch.rand(B, K) < 0.7
    options = dict(zip(("mask", "query_mask"), masks, strict=True)) if masked else {}
    elip_kernels.attention_column_mean(q.to(dtype), k.to(dtype), **options)


def received_works(B, N, D, K, dtype, group=2, masked=False):
    d = D // 12 + 1
    shape = (B, 3 * group, 3, K, N, d, dtype)
    works = [least_work.query_sums(*shape), least_work.key_sums(*shape)]
    works.append(least_work.column_mean(B, 3, N))
    if masked:
        works[0].read.update(mask=B * N, query_mask=B * K)
        works[1].read.update(mask=B * N, k=B * 3 * K * d * dtype.itemsize)
        works[2].read.update(query_mask=B * K)
    return works


def run_bipartite(B, N, D, K, dtype, has_size=True, has_penalty=False):
    tokens, metric, size = inputs(B, N, D, C, dtype)
    options = {"size": size if has_size else None}
    options["penalty"] = torch.rand(B, N) if has_penalty else None
    out, _ = elip_kernels.bipartite_merge(tokens.requires_grad_(), metric, K, **options)
    out.sum().backward()


def bipartite_works(B, N, D, K, dtype, has_size=True, has_penalty=False):
    r = min(K, (N - 1) // 2)
    return [
        least_work.bipartite_match(B, N, C, dtype, has_penalty=has_penalty),
        least_work.bipartite_slots(B, N),
        *merge_works(B, N, D, N - r, dtype, has_size=has_size),
    ]


def merge_works(B, N, D, R, dtype, **options):
    """Return the work of forward and backward for known slots."""
    return [
        least_work.merge_order(B, N, R, **options),
        least_work.merge_gather(B, N, D, R, dtype, **options),
        least_work.bipartite_merge_backward(B, N, D, N - R, dtype, **options),
    ]


def run_nearest(B, N, D, K, dtype, has_size=True):
    tokens, metric, size = inputs(B, N, D, C, dtype)
    kept, size = elip_kernels.select_tokens(torch.rand(B, N), K), size if has_size else None
    out, _ = elip_kernels.merge_nearest(tokens.requires_grad_(), kept, metric, size=size)
    out.sum().backward()


def nearest_works(B, N, D, K, dtype, has_size=True):
    return [
        least_work.select(B, N, K),
        least_work.nearest_match(B, N, C, K, dtype),
        *merge_works(B, N, D, 1 + K, dtype, has_size=has_size),
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


def check(op, case, **options):
    """Check that every byte is moved once and no other; return launches and works."""
    run, works = OPS[op]
    with traffic() as launches:
        run(*case, **options)
    least = works(*case, **options)
    for launched, work in zip(launches, least, strict=True):
        read = {name: access.unique for name, access in launched.loads.items()}
        assert {name: n for name, n in read.items() if name not in VECTORS} == work.read
        assert {name: access.unique for name, access in launched.stores.items()} == work.written
        assert {name: access.requested for name, access in launched.stores.items()} == work.written
    return launches, least


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_every_op_stores_each_byte_once_and_touches_nothing_else(name):
    """Also without a model of its work; `traffic` raises on an access outside of every tensor."""
    arguments = EXAMPLES[name].arguments(Sizes(B=2, N=21, D=40, K=12, H=2, dtype=fp32))
    with kernels_on_cpu(), traffic() as launched:
        EXAMPLES[name].outputs(arguments)
    assert launched
    for kernel in launched:
        assert all(access.requested == access.unique for access in kernel.stores.values()), kernel


@pytest.mark.parametrize("op", OPS)
def test_each_byte_of_a_small_call_moves_once(launches, op):
    check(op, SMALL[2])


@pytest.mark.parametrize("op", OPS)
def test_each_byte_moves_once(launches, op):
    check(op, SMALL[1])


@pytest.mark.slow
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_programs_touch_little_more_than_they_must(op):
    for kernel, moved in moved_over_distinct([op]).items():
        assert 1 <= moved <= SHARED.get(kernel, MOST), kernel


@pytest.mark.parametrize(
    ("op", "case", "options"),
    [
        ("reduce", (2, 21, 70, 8, fp32), {"masked": True}),
        ("reduce", (2, 21, 70, 8, fp32), {"num_prefix_tokens": 0}),
        ("reduce", (2, 21, 70, 8, fp32), {"num_prefix_tokens": 3, "masked": True}),
        ("reduce", (2, 21, 70, 8, fp32), {"merge": False}),
        ("received", (2, 150, 40, 70, bf16), {"masked": True}),
        ("received", (2, 150, 40, 70, bf16), {"group": 1}),
        ("score_reduce", (2, 21, 70, 8, bf16), {"merge": False}),
        ("score_reduce", (2, 21, 70, 8, bf16), {"has_text": True}),
        ("bipartite", (2, 21, 70, 8, bf16), {"has_size": False}),
        ("bipartite", (2, 21, 70, 8, bf16), {"has_penalty": True}),
        ("nearest", (2, 21, 70, 8, bf16), {"has_size": False}),
    ],
    ids=str,
)
def test_options_of_an_op(launches, op, case, options):
    check(op, case, **options)


def test_a_key_is_read_once_for_the_heads_of_its_group(launches):
    launched, works = check("generic_row", (2, 150, 40, 8, bf16), group=4)
    assert launched[0].loads["k"].per_program == works[0].read["k"]


def test_an_output_of_many_tokens_is_made_in_parts(launches, monkeypatch):
    monkeypatch.setattr(launch, "PART", 64)
    check("attend", (2, 150, 70, 8, bf16))


@pytest.mark.parametrize("options", [{}, {"merge": False, "masked": True}], ids=str)
@pytest.mark.parametrize(
    "limits", [{"MAX_SELECTED": 200}, {"MAX_SELECTED": 64, "TILE": 64}], ids=str
)
def test_many_tokens_are_selected_first(launches, monkeypatch, limits, options):
    for name, value in ({"MAX_MOVED": 64} | limits).items():
        monkeypatch.setattr(launch, name, value)
    check("reduce", (2, 150, 70, 60, bf16), **options)
    check("score_reduce", (1, 150, 40, 60, bf16))


def flops(op, *case, **options):
    """Return the FLOPs that PyTorch counts for the ops of a call."""
    with FlopCounterMode(display=False) as counter:
        OPS[op][0](*case, **options)
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "elip" in str(op))


@pytest.mark.parametrize("op", OPS)
def test_operations_are_those_of_the_flop_formulas(op):
    case = (2, 21, 36, 8, fp32)
    counted = flops(op, *case)
    assert sum(work.operations for work in OPS[op][1](*case)) == counted
    assert counted > 0


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, TOO_MANY: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N + TOO_MANY)
    tl.store(out_ptr + offs, x, mask=offs < N)


@pytest.fixture
def x_and_out():
    """Return two vectors with free memory around them."""
    memory = torch.zeros(100)
    return memory[10:29], memory[50:69]


def test_every_access_is_counted(x_and_out):
    with traffic() as seen:
        _copy_kernel[(2,)](*x_and_out, 19, TOO_MANY=0, BLOCK=32)
    load, store = seen[0].loads["x"], seen[0].stores["out"]
    assert (seen[0].kernel, seen[0].programs, seen[0].per_program) == ("_copy_kernel", 2, 4 * 76)
    assert load == store == Access(requested=152, per_program=152, unique=76, rounds=1)


def test_an_off_by_one_mask_is_found(x_and_out):
    x, out = x_and_out
    where = "_copy_kernel: load of 1 lanes outside every tensor, the first 76 bytes after the .* x"
    with traffic(), pytest.raises(IndexError, match=where):
        _copy_kernel[(1,)](x, out, 19, TOO_MANY=1, BLOCK=32)
    _copy_kernel[(1,)](x, out, 19, TOO_MANY=1, BLOCK=32)  # no error without traffic()
