"""BERT as a list of transformers' layers: embeddings, cross attention to image tokens, head.

BertModel of transformers has embeddings, and cross attention in all of its layers or in none. Here
a model selects the layers to run and their inputs. ALBEF's first half encodes the text alone; its
second half and all layers of BLIP also attend to the image. METER has two stacks without embeddings
that attend to one another. BlipTextModel of transformers has eager attention only; these layers run
on SDPA.
"""

import copy
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.cache_utils import Cache
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertOnlyMLMHead

from elip_kernels import cls_attention
from elip_models.pretraining.models.layers.text_reduction import ReducedText, TextReduction
from elip_models.towers.base import scoring_context
from elip_models.towers.wrapped_modules import unsharded

recompute = partial(checkpoint, use_reentrant=False)


class BertTower(nn.Module):
    """Embeddings and a list of layers, some with cross attention to image tokens.

    `cross_attention` are the indices of these layers. With embeddings=None, there are only layers.
    """

    def __init__(
        self,
        config: BertConfig,
        cross_attention: Iterable[int] = (),
        embeddings: type[nn.Module] | None = BertEmbeddings,
    ) -> None:
        super().__init__()
        options = config.to_dict() | {"attn_implementation": "sdpa"}
        self.config = config = type(config)(**options)
        crossing = BertConfig(**options | {"is_decoder": True, "add_cross_attention": True})
        self.grad_checkpointing = False
        chosen = set(cross_attention)
        self.embeddings = embeddings(config) if embeddings else None
        self.layers = nn.ModuleList(
            BertLayer(crossing if i in chosen else config, layer_idx=i)
            for i in range(config.num_hidden_layers)
        )
        self.apply(self.init)

    def init(self, module: nn.Module) -> None:
        """Initialise one module as BERT does: weights from N(0, initializer_range), biases zero."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Embed input_ids (B, L) at position_ids (L,), by default from the first -> (B, L, D)."""
        table = self.embeddings.position_embeddings
        unused = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa
        if position_ids is None and input_ids.shape[1] > table.num_embeddings - unused:
            raise ValueError(
                f"input_ids: expected at most {table.num_embeddings - unused} tokens per text, got "
                f"{input_ids.shape[1]}; truncate the texts, or set a larger max_positions"
            )
        return self.embeddings(input_ids=input_ids, position_ids=position_ids)

    def run(
        self,
        hidden: Tensor,
        mask: Tensor,
        layers: range | None = None,
        image_tokens: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run some of the layers, by default all, on hidden states (B, L, D) -> (B, L, D).

        `mask` (B, T) is of the cached tokens followed by those of `hidden`. Layers with cross
        attention attend to image_tokens (B, N, D), masked by image_mask (B, N). With `causal`, each
        token attends to itself and earlier tokens only. This call extends `cache`, the keys and
        values of earlier tokens.
        """
        bias = (mask != 0)[:, None, None]
        if causal:
            L, T = hidden.shape[1], mask.shape[1]
            bias = bias & torch.ones(L, T, dtype=torch.bool, device=mask.device).tril(T - L)
        image_bias = None if image_mask is None else (image_mask != 0)[:, None, None]
        for i in range(len(self.layers)) if layers is None else layers:
            layer, inputs = self.layers[i], (hidden, bias, image_tokens, image_bias, cache)
            recomputes = self.grad_checkpointing and layer.training
            hidden = recompute(layer, *inputs) if recomputes else layer(*inputs)
        return hidden

    def run_reduced(
        self,
        hidden: Tensor,
        mask: Tensor,
        reduction: TextReduction | None,
        image_tokens: Tensor | None = None,
        *,
        image_cls: Tensor | None = None,
        causal: bool = False,
    ) -> ReducedText:
        """Run all layers, and drop text tokens half way, never the first one.

        With 'learned', a causal text selects among all of its tokens, so a token's context can
        depend on later tokens. image_cls (B, D), by default the first image token, is the CLS
        output of the image that guides 'learned', without gradient. For the others, see `run`.
        """
        run = partial(self.run, image_tokens=image_tokens, causal=causal)
        if reduction is None:
            return ReducedText(run(hidden, mask), mask)
        half, depth = len(self.layers) // 2, len(self.layers)
        hidden, real, scores = run(hidden, mask, range(half)), mask != 0, None
        if reduction.strategy == "learned":
            cls = image_tokens[:, 0] if image_cls is None else image_cls
            scores = self._cls_scores(cls, self.layers[half], hidden, real)
        text = reduction(hidden, real, scores)
        return text._replace(tokens=run(text.tokens, text.mask, range(half, depth)))

    def _cls_scores(self, cls: Tensor, layer: BertLayer, hidden: Tensor, real: Tensor) -> Tensor:
        with scoring_context(self, hidden), unsharded(layer, hidden, cls) as (hidden, cls):
            attention = layer.attention.self
            heads = (attention.num_attention_heads, -1)
            q = attention.query(cls.to(hidden.dtype)).unflatten(-1, heads)
            k = attention.key(hidden).unflatten(-1, heads).transpose(1, 2)
            return cls_attention(q, k, mask=real)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of storing their activations."""
        self.grad_checkpointing = enable


def tied_decoder(encoder: BertTower) -> BertTower:
    """Return a tower with its own self-attention that shares all other parts of the encoder."""
    decoder = copy.deepcopy(encoder)
    decoder.embeddings = encoder.embeddings
    for own, theirs in zip(decoder.layers, encoder.layers, strict=True):
        for name, part in theirs.named_children():
            if name != "attention":
                setattr(own, name, part)
    return decoder


def masked_language_head(tower: BertTower) -> BertOnlyMLMHead:
    """Return BERT's prediction head, tied to the word embeddings of the tower, if it has any."""
    head = BertOnlyMLMHead(tower.config)
    if tower.embeddings is not None:
        head.predictions.decoder.weight = tower.embeddings.word_embeddings.weight
    head.predictions.decoder.bias = head.predictions.bias
    return head
