"""EViT: reduce between a block's attention and its MLP, by the CLS row of that attention."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

import elip_kernels
from elip_kernels import ReductionInfo
from elip_kernels.ops.gather_ops import largest, take_rows
from elip_models.strategies.flops import TokenCounts
from elip_models.strategies.nearest import merge_nearest, nearest_flops
from elip_models.strategies.schedule import Stage
from elip_models.strategies.shares import ceil_of
from elip_models.strategies.strategy import Context, StageInfo, Strategy, counts_of, least_share
from elip_models.towers import Tower, TowerSize
from elip_models.towers.attention_rows import attention_row
from elip_models.towers.merge import Merge, check_merge
from elip_models.validation import Count, PositiveShare, check_fields, shortened


@dataclass(frozen=True)
class EViT(Strategy):
    """Keep the patches with the highest CLS attention, fuse the others (Liang et al., ICLR 2022).

        a   = CLS row of the block's attention, head mean;  K = ceil(keep_ratio * candidates)
        x   = [x_prefix, the K most attended in descending order, sum_dropped a x]

    Attributes:
        keep_ratio: the share of the candidates that each of `layers` keeps, in (0, 1]. None: the
            share that `keep` requires; the paper's is 0.7 in three layers.
        layers: 0-based block numbers; None means a quarter, half and three quarters of the depth
            (3, 6, 9 of 12), 'all' every block.
        attention_gradient: gradients reach the attention through the fused token, as in the
            paper's code.
        merge: as of `ELIPOptions`; 'one' is the paper's. 'nearest' compares this block's keys.
    """

    name: ClassVar[str] = "evit"
    summary: ClassVar[str] = "keeps the patches with high CLS attention"
    place: ClassVar[str] = "three blocks"
    keep_field: ClassVar[str | None] = "keep_ratio"
    replaces_block: ClassVar[bool] = True

    keep_ratio: PositiveShare | None = None
    layers: Literal["all"] | tuple[Count, ...] | None = None
    attention_gradient: bool = True
    merge: Merge = "one"

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        check_merge(self.merge)
        check_fields(self)
        at = self.layers
        if isinstance(at, tuple) and (not at or any(a >= b for a, b in pairwise(at))):
            raise ValueError(
                f"layers: expected rising 0-based block numbers, 'all' or None, got {shortened(at)}"
            )

    def why_unsupported(self, tower: Tower) -> str | None:
        """Return why the tower cannot be reduced: it needs a CLS token."""
        return (
            None
            if tower.has_cls
            else "the tower has no CLS token, whose attention selects and fuses"
        )

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return one stage per block in `layers` that drops patches."""
        keep_ratio = self.with_rate(size).keep_ratio
        depth, candidates, stages = size.depth, size.num_patches, []
        at = self.layers
        if at is None:
            at = sorted({depth // 4, depth // 2, 3 * depth // 4})
        elif at == "all":
            at = range(depth)
        if at[-1] >= depth:
            raise ValueError(f"layers: expected blocks below {depth}, the depth, got {at[-1]}")
        for i, following in pairwise((*at, depth)):
            keep = ceil_of(keep_ratio, candidates)
            if keep < candidates:
                stages.append(Stage(i, following - i, keep))
                candidates = keep + self.num_merged
        return tuple(stages)

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return the tokens in each block; a stage drops them before the block's MLP."""
        more = size.num_prefix_tokens + self.num_merged
        after = {stage.first: stage.keep + more for stage in self.stages(size)}
        return counts_of(size, lambda i, tokens: after.get(i, tokens))

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of the CLS rows, and of comparing keys with merge='nearest'."""
        counts, total = self.token_counts(size), 0
        for stage in self.stages(size):
            tokens = counts[stage.first].attention
            total += 2 * tokens * size.width
            if self.merge == "nearest":
                total += nearest_flops(size, tokens, stage.keep)
        return total

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Run block `stage.first`, reduced between its attention and its MLP."""
        i, p = stage.first, tower.num_prefix_tokens
        attended, row, keys = self._attend(tower, i, tokens)
        scores = row[:, p:]
        if context.replay is not None:
            chosen = context.replay.reduction.kept - p
        else:
            chosen = largest(scores.detach(), stage.keep)
        if self.merge == "nearest":
            metric = keys.detach().mean(1)
            tokens, info = merge_nearest(
                tower, stage, attended, row.detach(), context, kept=chosen + p, metric=metric
            )
            return tower.mlp(i, tokens), info
        fused = scores.scatter(1, chosen, 0.0)
        patches = attended[:, p:]
        kept = take_rows(attended, chosen + p)
        rows = [attended[:, :p], kept]
        if self.merge == "one":
            rows.append((fused.to(attended.dtype)[:, None] @ patches).to(attended.dtype))
        else:
            fused = torch.zeros_like(fused)
        weights = torch.cat([torch.zeros_like(row[:, :p]), fused], dim=1).detach()
        reduction = ReductionInfo(chosen + p, weights, None, p, self.merge == "one")
        tokens = torch.cat(rows, dim=1)
        shift = context.shift(attended, tokens, reduction)
        return tower.mlp(i, tokens), StageInfo(stage, reduction, row.detach(), shift=shift)

    def _attend(self, tower: Tower, i: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return block i's attention output, head-mean CLS row (B, N) and keys (B, H, N, d)."""
        q, k, v = tower.qkv(i, tokens)
        scale = tower.projections(i).scale
        bias = tower.position_bias(i)
        if self.attention_gradient or bias is not None:
            row = attention_row(q[:, :, 0], k, scale, None if bias is None else bias[:, :, 0])
            row = row if self.attention_gradient else row.detach()
        else:
            row = elip_kernels.cls_attention(q[:, :, 0].detach(), k.detach(), scale=scale)
        return tower.attend(i, tokens, qkv=(q, k, v)), row, k

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        """Return the strategy with the keep ratio of that strength."""
        return replace(self, keep_ratio=1 - strength * (1 - least_share(size)))
