"""Text towers from transformers."""

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel


class CLIPTextTower(nn.Module):
    """CLIP's causal text transformer, pooled at the end-of-text token.

    Args:
        width, depth, heads: of the transformer; the MLP is four times as wide.
        vocab_size, context_length: rows of the token and position embeddings.
        eos_token_id: the token whose output is the text's CLS vector.
        pad_token_id: of the tokenizer.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        vocab_size: int,
        context_length: int,
        eos_token_id: int,
        pad_token_id: int,
    ) -> None:
        super().__init__()
        self.eos_token_id = eos_token_id
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            vocab_size=vocab_size,
            max_position_embeddings=context_length,
            hidden_act="gelu",
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            bos_token_id=None,
            attn_implementation="sdpa",
        )
        self.transformer = CLIPTextModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids (B, L), attention_mask (B, L) with 1 = real -> (B, width) at the first EOS.

        A text cut off before its end has no EOS: the last real token stands in.
        """
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        is_eos = input_ids == self.eos_token_id
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is not None:
            is_eos = is_eos & (attention_mask != 0)
            places = places * (attention_mask != 0)
        position = torch.where(is_eos.any(1), is_eos.int().argmax(1), places.amax(1))
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), position]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        if enable:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.transformer.gradient_checkpointing_disable()
