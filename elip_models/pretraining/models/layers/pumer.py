"""PuMer: reduce image and text tokens in fusion, by text-informed pruning and by merging.

    a_n     mean attention that image token n receives from the text, in the cross attention
    image   keep CLS and the tokens with the largest a, N - round(prune N) in all; then merge
            round(merge N) of them, at most every second one, into the most similar, by the keys of
            that attention, in the order of a
    text    merge round(merge_text L) tokens into the most similar, by the keys of self-attention

Merging is ToMe's bipartite soft matching, within each modality. A merged token is the mean of its
tokens, and CLS tokens are not merged. A text layer reduces between its cross attention and its MLP.
The image layer beside it and all later layers run on the remaining tokens.

The official code differs in four points. It can drop the image CLS, which METER's heads read. It
treats padding as words. It merges no image tokens unless it prunes some. Its image layer attends to
the text that leaves the text layer; here, as in METER, to the text that enters it.
Source: Cao et al., PuMer: Pruning and Merging Tokens for Efficient Vision Language Models, 2023.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from elip_kernels import attention_column_mean, bipartite_merge
from elip_kernels.ops.gather_ops import largest, take_rows
from elip_models.towers.base import scoring_context
from elip_models.validation import Count, Rate, check_fields


class FusionTokens(NamedTuple):
    """Tokens of both sides in a co-attention layer, with masks: True or 1 = real, None = all."""

    text: Tensor
    text_mask: Tensor
    image: Tensor
    image_mask: Tensor | None = None


@dataclass(frozen=True)
class PuMer:
    """Amount and place of the reduction, checked; the defaults are the paper's METER for VQA.

    Attributes:
        layers: indices of the co-attention layers that reduce.
        prune: share of the image tokens of such a layer to drop.
        merge: share of the image tokens to merge.
        merge_text: share of the text tokens to merge.
    """

    layers: tuple[Count, ...] = (0, 1, 2, 3)
    prune: Rate = 0.2
    merge: Rate = 0.2
    merge_text: Rate = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.layers, int):  # from a spec such as 'pumer:layers=0'
            object.__setattr__(self, "layers", (self.layers,))
        check_fields(self)

    def run(
        self, layer: BertLayer, inputs: FusionTokens, *, keeps_text: bool = False
    ) -> FusionTokens:
        """Run a text layer, and reduce both sides before its MLP; keeps_text merges no text."""
        text, text_mask, image, image_mask = inputs
        real = text_mask != 0
        image_real = None if image_mask is None else image_mask != 0
        attended, _ = layer.attention(text, _attention_mask(real))
        keys_input = image.to(text.dtype)  # FSDP can give two dtypes
        fused, _ = layer.crossattention(attended, None, keys_input, _attention_mask(image_real))
        with scoring_context(layer, text):
            cross = layer.crossattention.self
            image_keys, text_keys = _project_heads(cross, "key", keys_input), None
            query = _project_heads(cross, "query", attended)
            received = attention_column_mean(query, image_keys, mask=image_real, query_mask=real)
            if not keeps_text:
                text_keys = _project_heads(layer.attention.self, "key", text).mean(1)
        image, image_real = self._reduce_image(image, image_keys.mean(1), received, image_real)
        if text_keys is not None:
            count = round(self.merge_text * text.shape[1])
            fused, real = _merge(fused, text_keys, count, real)
        return FusionTokens(layer.feed_forward_chunk(fused), real, image, image_real)

    def _reduce_image(
        self, image: Tensor, keys: Tensor, received: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        N = image.shape[1]
        pruned, count = round(self.prune * N), round(self.merge * N)
        if not pruned and not count:
            return image, real
        first = torch.arange(N, device=image.device) == 0
        received = received.nan_to_num(0.0).masked_fill(first, torch.inf)  # NaN for an empty text
        kept = largest(received, max(1, N - pruned))
        image, keys = take_rows(image, kept), take_rows(keys, kept)
        real = None if real is None else real.gather(1, kept)
        return _merge(image, keys, count, real)


def _attention_mask(real: Tensor | None) -> Tensor | None:
    return None if real is None else real[:, None, None]


def _project_heads(attention: BertSelfAttention, name: str, x: Tensor) -> Tensor:
    projection: nn.Module = getattr(attention, name)
    return projection(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def _merge(
    tokens: Tensor, keys: Tensor, count: int, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Merge `count` tokens (B, N, C), never the first, into the most similar ones."""
    if real is None:
        return bipartite_merge(tokens, keys, count)[0], None
    # Padding gets equal keys, so it merges first; the penalty makes it the last choice as a target.
    second = torch.arange(tokens.shape[1], device=tokens.device) % 2
    keys = torch.where(real[..., None], keys, (1 - second)[:, None].to(keys.dtype))
    last = real.float() * 4.0
    tokens, size = bipartite_merge(tokens, keys, count, size=real.float(), penalty=last)
    return tokens, size > 0
