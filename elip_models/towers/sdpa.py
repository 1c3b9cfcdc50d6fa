"""use_sdpa_: fused attention for the vision layers of transformers' BLIP, which attend eagerly.

    softmax(scale * q k^T) v  by scaled_dot_product_attention, with the layer's own projections

In every other supported model, the library's own switch selects the attention.
"""

from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.towers.wrapped_modules import library_class
from elip_models.validation import check

M = TypeVar("M", bound=nn.Module)


class SdpaForward:
    """A replacement of a BlipAttention's forward; it returns None as the attention map."""

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Attend among hidden_states (B, N, D); returns (B, N, D) and None."""
        attn = self.attn
        if kwargs.get("attention_mask") is not None:
            raise ValueError("attention_mask: expected none, as BLIP's vision layers have none")
        qkv = attn.qkv(hidden_states).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = attn.dropout.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale)
        return attn.projection(out.transpose(1, 2).flatten(2)), None


def use_sdpa_(model: M, enabled: bool = True) -> M:
    """Switch BLIP's vision layers to fused attention, in place, and return the model.

    Parameters and state_dict keys stay. Outputs agree up to rounding; attention dropout draws other
    numbers. Attention maps (`output_attentions`) become None. Call it before torch.compile.

    Args:
        model: a model of transformers that contains BlipAttention.
        enabled: False restores the layers' own forward.

    Raises:
        TypeError: the model has no such layers, or their forward was replaced before.
    """
    check("enabled", enabled, bool)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    layers = [m for m in modules if library_class(m).__name__ == "BlipAttention"]
    if not layers:
        raise TypeError(
            "model: expected one with BLIP's vision layers of transformers, got "
            f"{type(model).__name__}; other models choose their attention themselves "
            "(attn_implementation='sdpa')"
        )
    for attn in layers:
        replaced = vars(attn).get("forward")
        if replaced is not None and not isinstance(replaced, SdpaForward):
            raise TypeError("model: expected layers that run their own forward, got a replaced one")
        if enabled:
            attn.forward = SdpaForward(attn)
        elif replaced is not None:
            del attn.forward
    return model
