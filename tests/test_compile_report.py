"""The kernels compile ahead of time, without a GPU and without a spill."""

import pytest

from elip_kernels._triton import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is absent", allow_module_level=True)

from elip_kernels.testing.compile import compile_reduce, compile_rows, compile_score_reduce


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("candidates", [196, 256])
def test_reduce_compiles_for_sm90_without_a_spill(candidates, dtype):
    codes = compile_reduce(90, candidates=candidates, dtype=dtype)
    assert codes[0].registers <= 64
    assert codes[1].registers <= 40
    assert codes[1].shared == 0
    for code in codes:
        assert code.stack == 0
        assert code.local == 0
        assert not code.instructions["LDL"] + code.instructions["STL"]
        wide, loads = code.share_128("LDG")
        assert 0 < wide <= loads


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_masked_pruning_compiles_everywhere(arch):
    forward, _ = compile_reduce(arch, candidates=256, dtype="bf16", has_mask=True, merge=False)
    assert forward.stack == forward.local == 0


ROWS = [(197, "bf16"), (257, "fp32"), (577, "bf16")]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("num_tokens", "dtype"), ROWS)
@pytest.mark.parametrize("compiled", [compile_rows, compile_score_reduce])
def test_rows_and_boundaries_compile_without_a_spill(compiled, num_tokens, dtype, arch):
    for code in compiled(arch, num_tokens=num_tokens, heads=12, dtype=dtype):
        assert code.stack == code.local == 0
        assert code.shared <= 227 * 1024
