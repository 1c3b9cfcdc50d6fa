"""The error budget at the size of a ViT-B/14: N = 257, D = 768, twelve heads, against fp64."""

import torch

import elip_kernels
from tests.interpreted.absorbed import BUDGET, block, error, row_in_fp64


def test_the_row_of_tokens_with_outlier_channels(launches):
    N, D, H, dtype = 257, 768, 12, torch.bfloat16
    outliers = torch.where(torch.arange(D) % 97 == 5, 50.0, 1.0)
    tokens, cls = (torch.randn(1, N, D) * outliers).to(dtype), torch.randn(1, D).to(dtype)
    arguments = block(D, H * 8, dtype) | {"num_heads": H}
    row = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    assert launches["elip::cls_attention_from_tokens"] == 1
    assert error(row, row_in_fp64(tokens, cls, arguments)) <= BUDGET[dtype]
