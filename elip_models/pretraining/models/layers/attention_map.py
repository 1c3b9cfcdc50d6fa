"""The probabilities of one attention module, with the gradient of what is computed from them.

    A = softmax(scale q k^T + mask),  output = A v      A: (B, H, L, N), a leaf of autograd

Models compute attention by fused kernels, which form no A. An attention module of transformers
looks up the function that computes attention by a name in its config. `attention_map` gives one
module a config with another name, whose function forms A.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NAME = "elip_attention_map"


@contextmanager
def attention_map(model: nn.Module, attention: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets A (B, H, L, N) of each call of `attention`, a part of `model`.

    Only A requires a gradient inside: parameters do not, so no graph before A is stored. Outputs
    equal those of the module up to rounding. On exit, also after an error, all is restored.
    """
    _register()
    found: list[Tensor] = []
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = attention.config
    attention.config = copy(own)  # the layers share theirs
    attention.config._attn_implementation_internal = NAME
    hook = attention.register_forward_hook(lambda module, inputs, output: found.append(output[1]))
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield found
    finally:
        hook.remove()
        attention.config = own
        for parameter in frozen:
            parameter.requires_grad_(True)


@cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attend to values (B, H, N, d) without dropout -> (B, L, H, d) and A (B, H, L, N)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1).detach().requires_grad_()
    return (probabilities @ value).transpose(1, 2), probabilities
