"""Text tokens dropped half way through a text tower, padding aware.

    n real tokens of a text: n - int(drop * n) stay, in their order, the anchor among them
    L tokens of a batch:     K = L - int(drop * L) slots, enough for any text; spare ones are masked

The anchor is the token a text is read at: BERT's [CLS], CLIP's end of text. Nothing is merged.

Source: ELIP, section 4.4.1: "we preserved the first half of all Transformer layers and pruned 40%
of text tokens in the second half", of METER and BLIP (Table 7). Our reading: in every pass of a
text encoder or decoder, tokens leave once, before layer depth // 2, and what follows (METER's
fusion, the heads) sees those that stay. 40% is of each text's real tokens. A dropped token has no
output, so that its label is not asked for: of MLM its own id, of LM the id after it.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import elip_kernels
from elip_models.models.layers.losses import IGNORED
from elip_models.validation import Rate, check_fields

TextStrategy = Literal["random", "post", "learned"]


class ReducedText(NamedTuple):
    """What stays of a batch of texts.

    tokens: (B, K, D); slots that a text does not need hold some of its other tokens, last.
    mask: (B, K) bool, True = kept, False = such a slot.
    anchor: (B,) int64, where the anchor is now.
    kept: (B, K) int64, positions in the input; ascending where `mask` is True.
    Where nothing is dropped, `mask` is the one that came, and `anchor` and `kept` are None.
    """

    tokens: Tensor
    mask: Tensor
    anchor: Tensor | None = None
    kept: Tensor | None = None

    def labels(self, labels: Tensor) -> Tensor:
        """Labels (B, L) of all tokens -> (B, K), of those that stay; a dropped token is not asked
        for its own.
        """
        if self.kept is None:
            return labels
        return labels.gather(1, self.kept).masked_fill(~self.mask, IGNORED)


@dataclass(frozen=True)
class TextReduction:
    """Says which text tokens are dropped, and how many.

    strategy: 'random' draws them from torch's generator; 'post' drops the last ones; 'learned' the
        ones with the least score, which the caller gives. Of 'learned' the paper says only that the
        vision encoder's [CLS] features guide it. Our reading: the score of a token is the attention
        that the vision CLS pays it, where it is the query of the first layer after the reduction
        in place of the anchor: `elip_kernels.cls_attention`.
    drop: share of a text's real tokens, in [0, 1).

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """

    strategy: TextStrategy
    drop: Rate = 0.4

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, tokens: Tensor, mask: Tensor, anchor: Tensor | int, scores: Tensor | None = None
    ) -> ReducedText:
        """Drop tokens; nothing waits for the device, and no shape depends on values.

        Args:
            tokens: (B, L, D), floating point; gradients reach the kept ones.
            mask: (B, L) bool, True = real. The anchor counts as real.
            anchor: (B,) int64, or an int for all texts: the position of the token that stays.
            scores: (B, L), for 'learned' only. Ties: the lower index stays; NaN goes first.

        Raises:
            TypeError, ValueError: naming the argument, what was expected, what came, what to do.
        """
        _check(tokens, mask, anchor, scores, self.strategy)
        B, L, _ = tokens.shape
        if isinstance(anchor, int):
            anchor = torch.full((B,), anchor, device=tokens.device)
        anchor = anchor[:, None]
        mask = mask.scatter(1, anchor, True)
        stays = self._stays(mask, anchor, scores)
        reduced, info = elip_kernels.reduce(
            tokens,
            stays.float(),
            L - int(self.drop * L),
            merge=False,
            mask=stays,
            num_prefix_tokens=0,
            return_info=True,
        )
        place = (info.kept == anchor).int().argmax(1)
        return ReducedText(reduced, info.mask, place, info.kept)

    def _stays(self, mask: Tensor, anchor: Tensor, scores: Tensor | None) -> Tensor:
        """Choose each text's n - int(drop * n) first tokens by anchor, key and position -> (B, L)
        bool.
        """
        key = self._key(mask, scores).masked_fill(~mask, -torch.inf).scatter(1, anchor, torch.inf)
        order = key.argsort(dim=1, descending=True, stable=True)
        n = mask.sum(1, keepdim=True)
        count = n - (n.double() * self.drop).long()
        first = torch.arange(mask.shape[1], device=mask.device) < count
        return torch.zeros_like(mask).scatter(1, order, first)

    def _key(self, mask: Tensor, scores: Tensor | None) -> Tensor:
        """Give each token a finite float (B, L); those with the smallest are dropped first."""
        if self.strategy == "random":
            return torch.rand(mask.shape, device=mask.device)
        if self.strategy == "post":
            return -torch.arange(mask.shape[1], device=mask.device).float().expand(mask.shape)
        least, most = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
        return scores.detach().nan_to_num(least, most, least)


def _check(tokens: Any, mask: Any, anchor: Any, scores: Any, strategy: str) -> None:
    """Check what `reduce` does not: mask, anchor and scores fit the tokens."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        raise TypeError(f"tokens: expected a tensor (B, L, D), got {_describe(tokens)}")
    B, L, _ = tokens.shape
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (B, L):
        raise ValueError(
            f"mask: expected a bool tensor (B, L) = {(B, L)}, True = real, got {_describe(mask)}"
        )
    if isinstance(anchor, int) and not isinstance(anchor, bool):
        if not 0 <= anchor < L:
            raise ValueError(f"anchor: expected a position from 0 to {L - 1}, got {anchor}")
    elif not isinstance(anchor, Tensor) or anchor.dtype != torch.int64 or anchor.shape != (B,):
        raise ValueError(
            f"anchor: expected an int, or an int64 tensor (B,) = ({B},), got {_describe(anchor)}"
        )
    if strategy != "learned":
        return
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(
            f"scores: expected a floating-point tensor (B, L) = {(B, L)} for strategy='learned', "
            f"got {_describe(scores)}; elip_kernels.cls_attention makes them of the vision CLS"
        )
    if scores.shape != (B, L):
        raise ValueError(f"scores: expected (B, L) = {(B, L)}, got {_describe(scores)}")


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
