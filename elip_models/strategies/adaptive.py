"""ELIP with a number of kept patches per image, by the share of the attention that they receive.

    K_b  = the fewest patches that receive `keep_mass` of the row's attention, at most K
    x_b  = [x_cls, the K_b most attended in image order, K - K_b slots of padding, merged others]

The paper names the fixed ratio for all images as a limitation. Slots are padded to the schedule's K
and masked in attention, so that shapes are static and nothing synchronises. So this saves no time
over `elip`; `StageInfo.mean_keep` shows what packed tokens could save. After the last block each
patch gets its token back, so that no head or text reads padding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elip_kernels import ReductionInfo
from elip_kernels.ops.gather_ops import largest, take_rows
from elip_kernels.ops.select_device import LEAST_SUM
from elip_models.strategies.elip import ELIP, Staged, query_of
from elip_models.strategies.nearest import merge_nearest
from elip_models.strategies.schedule import Stage
from elip_models.strategies.scorers import ScorerName
from elip_models.strategies.strategy import Context, StageInfo
from elip_models.towers import Tower, TowerSize
from elip_models.towers.base import scoring_context
from elip_models.validation import PositiveShare


@dataclass(frozen=True)
class AdaptiveELIP(ELIP):
    """Keep the fewest patches of each image that receive `keep_mass` of the CLS attention.

    Attributes:
        keep_mass: the share of a row's attention on patches, in (0, 1]. The schedule is the upper
            bound of the number of patches, and what `keep` sets.
        schedule, fusion, guidance_norm, without_text, merge, proportional: as of `ELIP`; merge
            cannot be 'none', and the scorer is 'last'.
    """

    name: ClassVar[str] = "adaptive"
    summary: ClassVar[str] = "keeps 90% of the CLS attention of each image"
    replaces_block: ClassVar[bool] = True
    replaces_later: ClassVar[bool] = True
    pads: ClassVar[bool] = True

    scorer: ScorerName = "last"
    keep_mass: PositiveShare = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer != "last":
            raise ValueError(
                "scorer: expected 'last' with strategy='adaptive', since whole layers do not mask "
                f"the padding, got {self.scorer!r}"
            )
        if self.merge == "none":
            raise ValueError(
                "merge: expected 'one' or 'nearest' with strategy='adaptive', got 'none'"
            )

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return the stages of the schedule that drop patches."""
        return tuple(s for s in super().stages(size) if s.keep < size.num_patches)

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of the rows; all but the first mask padding and project every key."""
        tokens_entering, masked = self.tokens_entering(size), size._replace(absorbs_keys=False)
        rows = sum(map(size.row_flops, tokens_entering[:1])) + sum(
            map(masked.row_flops, tokens_entering[1:])
        )
        return rows + Staged.scoring_flops(self, size)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Reduce each image to its own number of patches, then run the block with a mask."""
        row = self._row(tower, stage, tokens, context)
        tokens, info = self._reduce(tower, stage, tokens, row, context)
        tower = tower.with_positions(tower.positions_after(info.reduction))
        return self.run_later_block(tower, stage.first, tokens, info), info

    def run_later_block(self, tower: Tower, i: int, tokens: Tensor, previous: StageInfo) -> Tensor:
        """Run block i without attention to padding."""
        if self.proportional:  # padding is of size 0
            return super().run_later_block(tower, i, tokens, previous)
        mask = previous.reduction.mask
        bias = torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, float("-inf"))
        return tower.mlp(i, tower.attend(i, tokens, bias[:, None, None]))

    def _row(self, tower: Tower, stage: Stage, tokens: Tensor, context: Context) -> Tensor:
        """Return the CLS row (B, N) of the stage's last layer, 0 at padding."""
        if context.replay is not None:
            return context.replay.attention
        mask = None if context.previous is None else context.previous.reduction.mask
        with scoring_context(tower.trunk, tokens):
            cls = query_of(tower, tokens, context.text_cls, self).fused()
            return tower.cls_attention(stage.last, tokens, cls, mask=mask)

    def _reduce(
        self, tower: Tower, stage: Stage, tokens: Tensor, row: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Select and merge by the row; the slots that an image does not fill are padding."""
        p = tower.num_prefix_tokens
        with torch.no_grad():
            chosen, real, weights = self._select(row[:, p:], stage.keep)
        prefix = torch.ones_like(real[:, :1]).expand(-1, p)
        if self.merge == "nearest":  # padding has size 0, so it adds nothing
            kept = (chosen + p).masked_fill(~real, -1)
            tokens, info = merge_nearest(tower, stage, tokens, row, context, kept=kept)
            mask = torch.cat([prefix, real], dim=1)
            reduction = info.reduction._replace(kept=chosen + p, mask=mask)
            return tokens, info._replace(reduction=reduction)
        patches = tokens[:, p:]
        kept = take_rows(tokens, chosen + p)
        merged = (weights.to(tokens.dtype)[:, None] @ patches).to(tokens.dtype)
        tokens = torch.cat([tokens[:, :p], kept, merged], dim=1)
        mask = torch.cat([prefix, real, weights.sum(1, keepdim=True) > 0], dim=1)
        weights = torch.cat([torch.zeros_like(row[:, :p]), weights], dim=1)
        return tokens, StageInfo(stage, ReductionInfo(chosen + p, weights, mask, p), row)

    def _select(self, scores: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the patches in slots (B, K), which slots are filled, and merge weights (B, n)."""
        n = scores.shape[1]
        order = largest(scores, n)
        ranked = scores.gather(1, order)
        mass = ranked.cumsum(1) - ranked  # of the patches before
        enough = (mass < self.keep_mass * ranked.sum(1, keepdim=True)).sum(1, keepdim=True)
        count = enough.clamp(1, keep)
        rank = order.argsort(1)
        is_kept = rank < count
        index = torch.arange(n, device=scores.device)
        slots = torch.where(is_kept, index, index + n).argsort(1)[:, :keep]
        weights = scores.masked_fill(is_kept, 0.0)
        weights = weights / (weights.sum(1, keepdim=True) + LEAST_SUM)
        return slots, index[:keep] < count, weights
