"""The kernels compile ahead of time, without a GPU: registers, spills, access widths."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

import elip_kernels
from elip_kernels._triton import HAS_TRITON, triton

if not HAS_TRITON:
    pytest.skip("triton is absent, so there is nothing to compile", allow_module_level=True)

from benchmarks.kernel_analysis import report
from benchmarks.kernel_analysis.compile import (
    ARCHITECTURES,
    compile_launch,
    recorded_launches,
    warps_at_once,
)
from elip_kernels.testing import BATCHES, REAL_CASES, WITH_KERNELS
from tests.helpers.tiers import first_quick, tiered

KEEP = dict(REAL_CASES) | {1025: 400, 4097: 1600, 16_385: 6000}
SIZE = {"bf16": 2, "fp32": 4}
TRITON_3_6 = triton.__version__.startswith("3.6.")


@cache
def compiled(op, N, dtype, arch=90, B=BATCHES[0]):
    """Return (launch, code) by name of every kernel that an op launches."""
    launches = report.recorded_call(op, B, N, KEEP[N], dtype, arch)
    return {launch.name: (launch, compile_launch(launch, arch)) for launch in launches}


def is_clean(code):
    return code.stack == code.local == code.spills == 0 and code.occupancy[0] > 0


def moves_wide(code, tile):
    """Return whether the tile is loaded and stored by accesses of at least 128 bits (sm_90)."""
    return min(code.wide_bytes()) * 32 * code.num_warps >= tile


@pytest.mark.parametrize("dtype", first_quick(SIZE))
@pytest.mark.parametrize(("N", "registers"), first_quick([(257, 64), (577, 128)]))
def test_reduce_stays_in_registers_and_moves_by_128_bits(N, registers, dtype):
    launch, code = compiled("reduce", N, dtype)["_reduce_fwd_kernel"]
    assert is_clean(code)
    assert code.registers <= registers
    assert moves_wide(code, (N - 1) * launch.arguments["BLOCK_D"] * SIZE[dtype])


@pytest.mark.parametrize("dtype", first_quick(SIZE))
def test_reduce_backward_fills_the_machine_without_shared_memory(dtype):
    launch, code = compiled("reduce", 257, dtype)["_reduce_bwd_kernel"]
    assert is_clean(code)
    assert code.registers <= 40
    assert code.shared == 0
    assert code.occupancy[0] >= 48
    block_n, block_d = launch.arguments["BLOCK_N"], launch.arguments["BLOCK_D"]
    assert moves_wide(code, block_n * block_d * SIZE[dtype])


def loads_wide(code, tile):
    """Return whether a loop loads a tile per stage by accesses of at least 128 bits."""
    return code.wide_bytes()[0] * 32 * code.num_warps >= code.num_stages * tile


@pytest.mark.parametrize(("N", "dtype"), tiered(product([577, 16_385], SIZE), []))
def test_a_boundary_scores_and_moves_by_128_bits_at_every_size(N, dtype):
    codes = compiled("score_reduce", N, dtype)
    assert all(is_clean(code) for _, code in codes.values())
    most = {"_query_kernel": 192, "scores_kernel": 80}  # one block of the first fits an SM
    if N > 4097:
        most |= {"_row_kernel": 40, "_stream_kernel": 128}
    else:
        most["_score_select_kernel"] = 64 if N <= 1025 else 160
    most["_move_kernel"] = 64
    assert list(codes)[: len(most)] == list(most)
    for name, registers in most.items():
        assert codes[name][1].registers <= registers, name
    launch, code = codes["scores_kernel"]
    assert loads_wide(code, launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_K"] * SIZE[dtype])
    launch, code = codes["_move_kernel"]
    assert code.occupancy[0] >= 32
    assert moves_wide(code, launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_D"] * SIZE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("op", ["score_reduce", "cls_attention_output"])
def test_a_loop_for_blackwell_has_one_product_for_each_accumulator(op):
    """Two would be miscompiled by Triton 3.6 to 3.8 (triton issue 10821)."""
    products = {}
    for launch in report.recorded_call(op, 2, 257, 166, "bf16", 100):
        if launch.name in ("scores_kernel", "_weights_kernel"):
            products[launch.name] = compile_launch(launch, 100).products_in_loop
    assert list(products.values()) == [1]


@pytest.mark.parametrize(
    ("size", "arch", "dtype"),
    tiered(product([(1280, 16), (1024, 16), (384, 6)], ARCHITECTURES, SIZE), []),
)
def test_heads_of_every_width_make_their_query_without_a_spill(size, arch, dtype, monkeypatch):
    width, heads = size
    monkeypatch.setattr(report, "WIDTH", width)
    monkeypatch.setattr(report, "HEADS", heads)
    query, *_ = report.recorded_call("score_reduce", 2, 257, 166, dtype, arch)
    assert is_clean(compile_launch(query, arch))
    bare = {"norm_weight_ptr": None, "norm_bias_ptr": None}
    guided = {"text_ptr": query.arguments["cls_ptr"]}
    names = query.kernel.arg_names[: len(query.args)]
    terms = query.arguments["TERMS"]
    for changed, is_guided, number in (
        (bare, False, terms),
        (guided, True, terms),
        (guided, True, 3),  # fp32 tokens and two-byte matrices
    ):
        args = tuple((query.arguments | changed)[name] for name in names)
        options = query.options | {"HAS_TEXT": is_guided, "MATCH": is_guided, "TERMS": number}
        assert is_clean(compile_launch(replace(query, args=args, options=options), arch))


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_alignment_that_varies_with_the_batch_is_not_specialised(op, monkeypatch):
    """Otherwise another batch size would compile again."""
    monkeypatch.setattr(report, "HEADS", 6)
    odd, even = (report.recorded_call(op, B, 577, 300, "bf16", 90) for B in (7, 8))
    for one, other in zip(odd, even, strict=True):
        for parameter in one.kernel.params:
            values = [launch.arguments.get(parameter.name) for launch in (one, other)]
            if torch.is_tensor(values[0]):
                aligned = {value.data_ptr() % 16 == 0 for value in values}
                may_differ = parameter.do_not_specialize_on_alignment
                assert len(aligned) == 1 or may_differ, (one.name, parameter.name)


WIDEST = [  # op, width, heads, tokens, architecture
    ("score_reduce", 1536, 24, 1025, 90),
    ("cls_attention_from_tokens", 3072, 48, 257, 86),
    ("cls_attention_output", 2048, 16, 257, "gfx942"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "width", "heads", "N", "arch"), WIDEST)
def test_wide_towers_and_many_heads_compile_without_a_spill(op, width, heads, N, arch, monkeypatch):
    monkeypatch.setattr(report, "WIDTH", width)
    monkeypatch.setattr(report, "HEADS", heads)
    for dtype in SIZE if N == 257 else ["bf16"]:
        for launch in report.recorded_call(op, BATCHES[0], N, 166, dtype, arch):
            assert is_clean(compile_launch(launch, arch)), (launch.name, dtype)


@pytest.mark.parametrize(
    ("N", "op", "dtype"),
    tiered(product([577, 1025, 16_385], ["bipartite_merge", "merge_nearest"], SIZE), []),
)
def test_merging_stays_in_registers(N, op, dtype):
    for name, (_, code) in compiled(op, N, dtype).items():
        assert is_clean(code), name
        assert code.registers <= (40 if name == "_merge_bwd_kernel" else 128), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "arch"), [*product(WITH_KERNELS, [90]), ("score_reduce", 100), ("reduce", "gfx942")]
)
def test_every_kernel_compiles_everywhere_without_a_spill(op, arch):
    for B in BATCHES:
        codes = compiled(op, 257, "bf16", arch, B)
        assert codes
        for name, (_, code) in codes.items():
            if (name, arch) == ("scores_kernel", 100) and TRITON_3_6:
                assert code.spills <= 6  # code of that version for Blackwell
            else:
                assert is_clean(code), (name, code)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_grouped_heads_compile_without_a_spill(dtype):
    """The widest heads, four query heads per key head, with a mask: the largest program."""
    arch = 90
    width, mask = 64 if dtype == torch.float32 else 128, torch.ones(2, 577, dtype=torch.bool)
    q, k = torch.randn(2, 8, 577, width).to(dtype), torch.randn(2, 2, 577, width).to(dtype)
    with recorded_launches(arch) as launches:
        elip_kernels.attention_column_mean(q, k, mask=mask, query_mask=mask)
        elip_kernels.cls_attention(q[:, :, 0], k, mask=mask)
    assert len(launches) == 5
    for launch in launches:
        assert is_clean(compile_launch(launch, arch)), launch.name


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "occupancy"),
    [
        (90, 64, 2048, 8, (32, "registers")),
        (80, 255, 0, 4, (8, "registers")),
        (90, 16, 0, 1, (32, "blocks")),
        (90, 32, 0, 8, (64, "warps")),
        ("gfx942", 64, 0, 4, (32, "warps")),
    ],
)
def test_occupancy(arch, registers, shared, num_warps, occupancy):
    assert warps_at_once(arch, registers, shared, num_warps) == occupancy


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_every_launch_sets_precision_and_fusion(op):
    for launch in report.recorded_call(op, 2, 257, 166, "bf16", 90):
        assert launch.options["enable_fp_fusion"] is True, launch.name


PIPELINED = {
    "_query_kernel",
    "_lse_kernel",
    "_sums_kernel",
    "scores_kernel",
    "_weights_kernel",
    "_weigh_kernel",
    "_value_kernel",
    "_match_kernel",
    "_nearest_kernel",
    "_cosines_kernel",
}


@pytest.mark.parametrize("op", first_quick(["score_reduce", "bipartite_merge"]))
def test_loops_with_products_or_own_stages_are_pipelined(op):
    for name, (_, code) in compiled(op, 577, "bf16").items():
        assert (code.instructions["LDGSTS"] > 0) == (name in PIPELINED), name
