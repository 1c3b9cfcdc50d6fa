"""CLIP's text tower, from transformers, pooled at the end of a text."""

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel


class CLIPTextTower(nn.Module):
    """CLIP's causal text transformer, pooled at the end-of-text token."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.transformer = CLIPTextModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the output (B, width) at the first EOS, or at the last real token without one."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_eos = (input_ids == self.eos_token_id) & (real != 0)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) * (real != 0)
        end = torch.where(is_eos.any(1), is_eos.int().argmax(1), positions.amax(1))
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), end]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of storing their activations."""
        is_new = hasattr(self.transformer, "activation_checkpointing_enable")
        name = "activation" if is_new else "gradient"  # as before transformers 5.24
        if enable:
            getattr(self.transformer, f"{name}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.transformer, f"{name}_checkpointing_disable")()
