"""The probabilities of one attention module, with the gradient of what is computed from them.

    A = softmax(scale q k^T + mask),  output = A v      A: (B, H, L, N), a leaf of autograd

Models compute attention by fused kernels, which form no A. `attention_map` gives one module of
transformers a config that names another function, which forms A.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "elip_attention_map"


@contextmanager
def attention_map(model: nn.Module, attention: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets A (B, H, L, N) of each call of `attention`, a part of `model`.

    Only A requires a gradient inside: parameters do not, so no graph before A is stored. Outputs
    equal those of the module up to rounding. On exit, also after an error, all is restored.
    """
    maps: list[Tensor] = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = attention.config
    attention.config = copy(own)  # the layers share theirs
    attention.config._attn_implementation = NAME
    hook = attention.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield maps
    finally:
        hook.remove()
        attention.config = own
        for parameter in trainable:
            parameter.requires_grad_(True)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attend to values (B, H, N, d) without dropout -> (B, L, H, d) and A (B, H, L, N).

    The mask is boolean, as `BertTower` passes it.
    """
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    probabilities = scores.softmax(-1).detach().requires_grad_()
    return (probabilities @ value).transpose(1, 2), probabilities


AttentionInterface.register(NAME, _attend)
