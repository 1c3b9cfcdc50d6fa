"""Drop text tokens half way through a text tower; padding does not count.

    n real tokens of a text: n - int(drop * n) stay in order, with the anchor
    L tokens of a batch:     K = L - int(drop * L) slots; unused slots are masked

The anchor is the token whose output represents the text: BERT's [CLS], CLIP's end of text.

Source: ELIP, section 4.4.1: "we preserved the first half of all Transformer layers and pruned 40%
of text tokens in the second half", of METER and BLIP (Table 7). Our interpretation: each pass of a
text encoder or decoder drops tokens once, before layer depth // 2. Later parts, such as METER's
fusion and the heads, get the remaining tokens. 40% refers to the real tokens of each text. A
dropped token has no output, so its label is ignored: its own id for MLM, the next id for LM.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import elip_kernels
from elip_models.pretraining.models.layers.losses import IGNORED
from elip_models.validation import Rate, check_fields

TextStrategy = Literal["random", "post", "learned"]


class ReducedText(NamedTuple):
    """Remaining tokens of a batch of texts; without reduction, `anchor` and `kept` are None.

    Attributes:
        tokens: (B, K, D); unused slots, at the end, hold other tokens of the text.
        mask: (B, K) bool, True = kept token, False = unused slot; the given mask without reduction.
        anchor: (B,) int64, position of the anchor.
        kept: (B, K) int64, positions in the input, ascending where `mask` is True.
    """

    tokens: Tensor
    mask: Tensor
    anchor: Tensor | None = None
    kept: Tensor | None = None

    def labels(self, labels: Tensor) -> Tensor:
        """Select the labels (B, K) of the remaining tokens from those (B, L) of all tokens."""
        if self.kept is None:
            return labels
        return labels.gather(1, self.kept).masked_fill(~self.mask, IGNORED)


@dataclass(frozen=True)
class TextReduction:
    """Strategy and share of dropping text tokens.

    The paper says of 'learned' only that the vision encoder's [CLS] features guide it. Our
    interpretation: the score is an attention row of the first layer after the reduction. Its query
    is the image CLS instead of the anchor (`elip_kernels.cls_attention`).

    Attributes:
        strategy: 'random' drops random tokens, 'post' the last ones, 'learned' those with the least
            score.
        drop: share of the real tokens of a text, in [0, 1).
    """

    strategy: TextStrategy
    drop: Rate = 0.4

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, tokens: Tensor, mask: Tensor, anchor: Tensor | int, scores: Tensor | None = None
    ) -> ReducedText:
        """Drop tokens, without a host synchronisation and without shapes that depend on values.

        Args:
            tokens: (B, L, D), floating point; gradients reach the kept ones.
            mask: (B, L) bool, True = real token. The anchor counts as real.
            anchor: (B,) int64, or an int for all texts: position of a token that is kept.
            scores: (B, L), for 'learned' only. Ties keep the lower index; NaN counts as the least.
        """
        _check(tokens, mask, anchor, scores, self.strategy)
        B, L, _ = tokens.shape
        if isinstance(anchor, int):
            anchor = torch.full((B,), anchor, device=tokens.device)
        anchor = anchor[:, None]
        mask = mask.scatter(1, anchor, True)
        is_kept = self._keep_mask(mask, anchor, scores)
        reduced, info = elip_kernels.reduce(
            tokens,
            is_kept.float(),
            L - int(self.drop * L),
            merge=False,
            mask=is_kept,
            num_prefix_tokens=0,
            return_info=True,
        )
        position = (info.kept == anchor).int().argmax(1)
        return ReducedText(reduced, info.mask, position, info.kept)

    def _keep_mask(self, mask: Tensor, anchor: Tensor, scores: Tensor | None) -> Tensor:
        """Return (B, L) bool, True for the n - int(drop * n) tokens of each text that stay."""
        priority = self._priority(mask, scores).masked_fill(~mask, -torch.inf)
        priority = priority.scatter(1, anchor, torch.inf)
        order = priority.argsort(dim=1, descending=True, stable=True)
        n = mask.sum(1, keepdim=True)
        count = n - (n.double() * self.drop).long()
        first = torch.arange(mask.shape[1], device=mask.device) < count
        return torch.zeros_like(mask).scatter(1, order, first)

    def _priority(self, mask: Tensor, scores: Tensor | None) -> Tensor:
        """Return a finite priority (B, L); the least are dropped first."""
        if self.strategy == "random":
            return torch.rand(mask.shape, device=mask.device)
        if self.strategy == "post":
            return -torch.arange(mask.shape[1], device=mask.device).float().expand(mask.shape)
        least, most = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
        return scores.detach().nan_to_num(least, most, least)


def _check(tokens: Any, mask: Any, anchor: Any, scores: Any, strategy: str) -> None:
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
            f"got {_describe(scores)}; elip_kernels.cls_attention computes them from the image CLS"
        )
    if scores.shape != (B, L):
        raise ValueError(f"scores: expected (B, L) = {(B, L)}, got {_describe(scores)}")


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
