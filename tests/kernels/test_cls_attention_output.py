"""The attention output of the CLS token against that of a whole block."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import elip_kernels
from elip_kernels._operator import OPERATORS
from elip_kernels.ops.absorbed_query import QueryArguments
from tests.kernels.test_cls_attention import B, D, H, N, attention, block, op_arguments


def values(dtype=torch.float32, bias=True):
    v_weight = torch.randn(D, D, dtype=torch.float64) / 7
    v_bias = torch.randn(D, dtype=torch.float64) if bias else None
    return {
        "v_weight": v_weight.to(dtype),
        "v_bias": v_bias if v_bias is None else v_bias.to(dtype),
    }


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_attention_of_the_block(affine, bias):
    tokens, cls = torch.randn(B, N, D).double(), torch.randn(B, D).double()
    arguments, value = block(affine=affine, bias=bias), values(torch.float64, bias)
    rows, x = attention(tokens, cls, arguments, k_bias=torch.randn(D).double())  # cancels
    v = F.linear(x, *value.values()).unflatten(-1, (H, -1)).transpose(1, 2)
    got = elip_kernels.cls_attention_output(tokens, cls, **value, **arguments)
    torch.testing.assert_close(got, (rows @ v)[:, :, 0].flatten(1), atol=1e-12, rtol=0)


def test_flops_have_no_projection_of_the_tokens():
    tokens, cls = torch.randn(B, N, D), torch.randn(B, D)
    with FlopCounterMode(display=False) as counter:
        elip_kernels.cls_attention_output(tokens, cls, **block(torch.float32), **values())
    scores_and_sums, projections = 4 * B * H * N * D, 3 * 2 * B * D * D
    assert counter.get_total_flops() == scores_and_sums + projections


def test_a_head_too_wide_for_its_kernel_runs_pytorch():
    operator = OPERATORS["cls_attention_output"]
    tokens, *query = op_arguments(torch.randn(B, N, D))
    assert "Triton" in (operator.unsupported(tokens, *query) or "Triton")
    matrices = {name: torch.randn(2 * 129, D) for name in ("q_weight", "k_weight")}
    wide = QueryArguments(*query)._replace(num_heads=2, q_bias=None, **matrices)
    assert "at most 128 channels" in operator.unsupported(tokens, *wide)
    assert "at most 128 heads" in operator.unsupported(tokens, *wide._replace(num_heads=129))
    huge = torch.empty(1, 65536, 32768, device="meta")
    assert "fewer than 2^31 elements per image" in operator.unsupported(huge, *query)
