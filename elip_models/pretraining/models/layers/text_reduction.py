"""Drop text tokens half way through a text tower; padding does not count.

    n real tokens of a text: n - int(drop * n) stay in order, with the first, [CLS]
    L tokens of a batch:     K = L - int(drop * L) slots; unused slots are masked

Source: ELIP, section 4.4.1: "we preserved the first half of all Transformer layers and pruned 40%
of text tokens in the second half", of METER and BLIP (Table 7). Our interpretation: each pass of a
text encoder or decoder drops tokens once, before layer depth // 2. Later parts, such as METER's
fusion and the heads, get the remaining tokens. 40% refers to the real tokens of each text. A
dropped token has no output, so its label is ignored: its own id for MLM, the next id for LM.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elip_kernels.ops.gather_ops import take_rows
from elip_models.pretraining.models.layers.losses import IGNORED
from elip_models.validation import Rate, check_fields

TextStrategy = Literal["random", "post", "learned"]


class ReducedText(NamedTuple):
    """Remaining tokens of a batch of texts; without reduction, `kept` is None.

    Attributes:
        tokens: (B, K, D); unused slots, at the end, hold other tokens of the text.
        mask: (B, K) bool, True = kept token, False = unused slot; the mask passed in, if all stay.
        kept: (B, K) int64, positions in the input, ascending where `mask` is True.
    """

    tokens: Tensor
    mask: Tensor
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
    is the image CLS instead of the text's (`elip_kernels.cls_attention`).

    Attributes:
        strategy: 'random' drops random tokens, 'post' the last ones, 'learned' those with the least
            score.
        drop: share of the real tokens of a text, in [0, 1).
    """

    strategy: TextStrategy
    drop: Rate = 0.4

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, tokens: Tensor, mask: Tensor, scores: Tensor | None = None) -> ReducedText:
        """Drop tokens, without a host synchronisation and without shapes that depend on values.

        Args:
            tokens: (B, L, D), floating point; gradients reach the kept ones.
            mask: (B, L) bool, True = real token. The first token counts as real.
            scores: (B, L), for 'learned' only. Ties keep the lower index; NaN counts as the least.
        """
        L, device = tokens.shape[1], mask.device
        slots = torch.arange(L - int(self.drop * L), device=device)
        first = torch.arange(L, device=device) == 0
        mask = mask | first
        priority = self._priority(mask, scores).masked_fill(~mask, -torch.inf)
        priority = priority.masked_fill(first, torch.inf)
        order = priority.argsort(dim=1, descending=True, stable=True)[:, : len(slots)]
        n = mask.sum(1, keepdim=True)
        is_used = slots < n - (n.double() * self.drop).long()
        position = torch.where(is_used, order, L).sort(dim=1).values  # unused slots last
        kept = position.clamp_max(L - 1)
        return ReducedText(take_rows(tokens, kept), position < L, kept)

    def _priority(self, mask: Tensor, scores: Tensor | None) -> Tensor:
        """Return a finite priority (B, L); the least are dropped first."""
        if self.strategy == "random":
            return torch.rand(mask.shape, device=mask.device)
        if self.strategy == "post":
            return -torch.arange(mask.shape[1], device=mask.device).float().expand(mask.shape)
        least, most = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
        return scores.detach().nan_to_num(least, most, least)
