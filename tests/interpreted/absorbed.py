"""Parameters, errors and error budgets for tests of rows and of the absorbed ops."""

import torch

import elip_kernels

BUDGET = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 2e-4}
"""The largest error of a row, over its largest entry."""


def block(D, H, dtype):
    """Return the parameters of a block for the absorbed ops; heads of 8 channels."""
    width = H * 8
    arguments = {
        "norm_weight": torch.randn(D),
        "norm_bias": torch.randn(D),
        "q_weight": torch.randn(width, D) / D**0.5,
        "q_bias": torch.randn(width),
        "k_weight": torch.randn(width, D) / D**0.5,
    }
    return {n: v.to(dtype) for n, v in arguments.items()} | {"num_heads": H, "eps": 1e-6}


def error(got, exact):
    """Return the largest error over the largest entry."""
    return ((got - exact).abs().max() / exact.max()).item()


def row_in_fp64(tokens, cls, arguments):
    """Return the CLS row of the PyTorch implementation in fp64."""
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    return elip_kernels.cls_attention_from_tokens(tokens.double(), cls.double(), **wide)
