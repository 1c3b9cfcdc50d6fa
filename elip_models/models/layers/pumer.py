"""PuMer: tokens of both sides reduced within fusion, by what the text looks at and by likeness.

    a_n     attention that image token n receives from the text, in a layer's cross attention
    image   CLS, and of the others those of the largest a: N - round(prune N) in all; of these
            round(merge N), at most every second one, join the most alike, by the keys of that
            attention, in the order of a
    text    round(merge_text L) tokens join the most alike, by the keys of its self-attention

Merging is ToMe's bipartite soft matching, in either modality apart; the CLS tokens stay as they
are, and a token is the mean of what it holds. It takes place in a text layer, between its cross
attention and its MLP, so that the image layer beside it, and all that follow, run on what is left.

Ours: the image's CLS stays, which METER reads at the end; padding asks for nothing and dilutes no
token; the image layer reads the text that entered, as METER's does. The official code may drop CLS,
takes padding as it takes words, merges no image where it prunes none, and lets the image layer read
the text that leaves.
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


class Fused(NamedTuple):
    """Both sides in a layer.

    text: (B, L, C). text_mask: (B, L), True or 1 = real.
    image: (B, N, C). image_mask: (B, N) likewise, or None where all are.
    """

    text: Tensor
    text_mask: Tensor
    image: Tensor
    image_mask: Tensor | None = None


@dataclass(frozen=True)
class PuMer:
    """Where, and how much, fusion loses; the paper's METER for VQA.

    layers: co-attention layers that reduce, counted from 0.
    prune, merge: shares of the image tokens that enter such a layer.
    merge_text: share of the text tokens that enter it.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.
    """

    layers: tuple[Count, ...] = (0, 1, 2, 3)
    prune: Rate = 0.2
    merge: Rate = 0.2
    merge_text: Rate = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.layers, int):  # a line of text writes one layer so
            object.__setattr__(self, "layers", (self.layers,))
        check_fields(self)

    def run(self, layer: BertLayer, entered: Fused, *, keeps_text: bool = False) -> Fused:
        """A text layer, and what is left of both sides behind its cross attention.

        keeps_text: no text token merges, so that each has an output of its own.
        """
        text, text_mask, image, image_mask = entered
        real = text_mask != 0
        image_real = None if image_mask is None else image_mask != 0
        attended, _ = layer.attention(text, _open(real))
        read = image.to(text.dtype)  # as FSDP would cast both
        seen, _ = layer.crossattention(attended, None, read, _open(image_real))
        with scoring_context(layer, text):
            cross = layer.crossattention.self
            image_keys, text_keys = _heads(cross, "key", read), None
            query = _heads(cross, "query", attended)
            received = attention_column_mean(query, image_keys, mask=image_real, query_mask=real)
            if not keeps_text:
                text_keys = _heads(layer.attention.self, "key", text).mean(1)
        image, image_real = self._image(image, image_keys.mean(1), received, image_real)
        if text_keys is not None:
            count = round(self.merge_text * text.shape[1])
            seen, real = _merged(seen, text_keys, count, real)
        return Fused(layer.feed_forward_chunk(seen), real, image, image_real)

    def _image(
        self, image: Tensor, keys: Tensor, received: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        N = image.shape[1]
        pruned, count = round(self.prune * N), round(self.merge * N)
        if not pruned and not count:
            return image, real
        first = torch.arange(N, device=image.device) == 0
        received = received.nan_to_num(0.0).masked_fill(first, torch.inf)  # NaN: of an empty text
        kept = largest(received, max(1, N - pruned))
        image, keys = take_rows(image, kept), take_rows(keys, kept)
        real = None if real is None else real.gather(1, kept)
        return _merged(image, keys, count, real)


def _open(real: Tensor | None) -> Tensor | None:
    """(B, N) -> what an attention of transformers takes for it."""
    return None if real is None else real[:, None, None]


def _heads(attention: BertSelfAttention, name: str, x: Tensor) -> Tensor:
    """What a projection of the attention makes of x (B, N, C) -> (B, H, N, d)."""
    projection: nn.Module = getattr(attention, name)
    return projection(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def _merged(
    tokens: Tensor, keys: Tensor, count: int, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`count` of the tokens (B, N, C), but for the first, into the most alike -> what is left of
    them and of `real` (B, N).
    """
    if real is None:
        return bipartite_merge(tokens, keys, count)[0], None
    # Whatever stands in padding, it merges first, every second one, and is the last to merge into.
    second = torch.arange(tokens.shape[1], device=tokens.device) % 2
    keys = torch.where(real[..., None], keys, (1 - second)[:, None].to(keys.dtype))
    last = real.float() * 4.0
    tokens, size = bipartite_merge(tokens, keys, count, size=real.float(), penalty=last)
    return tokens, size > 0
