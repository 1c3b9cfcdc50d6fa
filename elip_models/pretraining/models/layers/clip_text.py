"""CLIP's text tower, from transformers, with an optional reduction of text tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from elip_models.pretraining.models.layers.text_reduction import TextReduction


class CLIPTextTower(nn.Module):
    """CLIP's causal text transformer, pooled at the end-of-text token.

    `reduction` drops text tokens before layer depth // 2 (ELIP, section 4.4.1); None keeps all.
    """

    def __init__(self, config: CLIPTextConfig, reduction: TextReduction | None) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.reduction = reduction
        self.transformer = CLIPTextModel(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        reduce: bool = True,
    ) -> Tensor:
        """Return the output (B, width) at the first EOS, or at the last real token without one."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position = self._position(input_ids, real != 0)
        if self.reduction is not None and reduce:
            hidden, position = self._reduced(input_ids, real != 0, position)
        else:
            hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), position]

    def _position(self, input_ids: Tensor, real: Tensor) -> Tensor:
        is_eos = (input_ids == self.eos_token_id) & real
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) * real
        return torch.where(is_eos.any(1), is_eos.int().argmax(1), positions.amax(1))

    def _reduced(self, input_ids: Tensor, real: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layers and drop tokens half way, outside of activation checkpointing.

        Tokens after EOS count as padding, since EOS does not attend to them.
        """
        layers = self.transformer.encoder.layers
        half = len(layers) // 2
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = real & (positions <= position[:, None])
        hidden = _run(layers[:half], self.transformer.embeddings(input_ids), real)
        text = self.reduction(hidden, real, position)
        hidden = _run(layers[half:], text.tokens, text.mask)
        return self.transformer.final_layer_norm(hidden), text.anchor

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of storing their activations."""
        if enable:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.transformer.gradient_checkpointing_disable()


def _run(layers: Iterable[nn.Module], hidden: Tensor, real: Tensor) -> Tensor:
    L = hidden.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=hidden.device).tril()
    mask = causal & real[:, None, None]
    for layer in layers:
        hidden = layer(hidden, mask)
    return hidden
