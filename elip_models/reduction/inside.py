"""EViT and ToMe: reductions between a block's attention and its MLP.

Both are made of the tower's own halves, `attend` and `mlp`, so that attention stays fused and every
tower can take them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

import elip_kernels
from elip_kernels import ReductionInfo
from elip_models.reduction.schedule import Stage
from elip_models.reduction.strategy import Context, Layer, StageInfo, Strategy
from elip_models.towers import Size, Tower


@dataclass(frozen=True)
class EViT(Strategy):
    """Keep by this forward's own CLS attention, fuse the others by it (Liang et al., ICLR 2022).

        a   = CLS row of the block's attention, head mean;  K = ceil(keep_rate * candidates)
        x   = [x_prefix, the K most attended in descending order, sum_dropped a x]     after attend

    keep_rate: of the candidates at each of `layers`, in (0, 1].
    layers: 0-based blocks; None means a quarter, half and three quarters of the depth (3, 6, 9 of
        12), 'all' every block.
    attention_gradient: gradients reach the attention through the fused token, as in the paper's
        code.
    """

    name: ClassVar[str] = "evit"
    takes_block: ClassVar[bool] = True

    keep_rate: float = 0.7
    layers: tuple[int, ...] | Literal["all"] | None = None
    attention_gradient: bool = True

    def __post_init__(self) -> None:
        check_share("keep_rate", self.keep_rate)
        check_flag("attention_gradient", self.attention_gradient)
        at = self.layers
        if at is None or at == "all":
            return
        is_ints = isinstance(at, (tuple, list)) and all(type(i) is int for i in at)
        if not is_ints or not at or any(a >= b for a, b in pairwise(at)) or at[0] < 0:
            raise ValueError(
                f"layers: expected rising 0-based block numbers, 'all' or None, got {at!r}"
            )
        object.__setattr__(self, "layers", tuple(at))

    def refuses(self, tower: Tower) -> str | None:
        return None if tower.has_cls else "the tower has no CLS token whose row keeps and fuses"

    def stages(self, size: Size) -> tuple[Stage, ...]:
        depth, candidates, stages = size.depth, size.num_patches, []
        at = self.layers
        if at is None:
            at = sorted({depth // 4, depth // 2, 3 * depth // 4})
        elif at == "all":
            at = range(depth)
        if at[-1] >= depth:
            raise ValueError(f"layers: expected blocks below {depth}, the depth, got {at[-1]}")
        for i, following in pairwise((*at, depth)):
            keep = math.ceil(self.keep_rate * candidates)
            if keep < candidates:
                stages.append(Stage(i, following - i, keep))
                candidates = keep + 1
        return tuple(stages)

    def token_counts(self, size: Size) -> tuple[Layer, ...]:
        after = {s.first: size.num_prefix_tokens + s.keep + 1 for s in self.stages(size)}
        return counts_of(size, lambda i, tokens: after.get(i, tokens))

    def scoring_flops(self, size: Size) -> int:
        counts = self.token_counts(size)
        return sum(2 * counts[s.first].attention * size.width for s in self.stages(size))

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        i, p = stage.first, tower.num_prefix_tokens
        tokens, row = context.run(self._attend, tower, i, tokens)
        scores = row[:, p:]
        if context.replay is not None:
            chosen = context.replay.reduction.kept - p
        else:
            chosen = scores.detach().sort(dim=1, descending=True, stable=True).indices
            chosen = chosen[:, : stage.keep]
        fused = scores.scatter(1, chosen, 0.0)
        patches = tokens[:, p:]
        kept = patches.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
        merged = fused.to(tokens.dtype)[:, None] @ patches
        tokens = torch.cat([tokens[:, :p], kept, merged.to(tokens.dtype)], dim=1)
        weights = torch.cat([torch.zeros_like(row[:, :p]), fused], dim=1).detach()
        reduction = ReductionInfo(chosen + p, weights, None, p)
        return context.run(tower.mlp, i, tokens), StageInfo(stage, reduction, row.detach())

    def _attend(self, tower: Tower, i: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Block i's attention half, and its CLS row (B, N), head mean."""
        q, k, v = tower.qkv(i, tokens)
        scale = tower.projections(i).scale
        if self.attention_gradient:
            at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
            row = ((q[:, :, :1] * scale) @ k.mT).softmax(-1, dtype=at_least_fp32)
            row = row.mean(1)[:, 0]
        else:
            row = elip_kernels.cls_attention(q[:, :, 0].detach(), k.detach(), scale=scale)
        return tower.attend(i, tokens, qkv=(q, k, v)), row

    def at_strength(self, size: Size, strength: float) -> Strategy:
        return replace(self, keep_rate=1 - strength * (1 - least_share(size)))


@dataclass(frozen=True)
class ToMe(Strategy):
    """Merge the r most alike pairs of tokens in every block (Bolya et al., ICLR 2023).

        attention with log(size) of each key added to its scores, then
        x, size = bipartite soft matching on the head mean of this block's keys       after attend

    r: tokens merged away, for every block, or one number a block.
    proportional: add log(size) to the scores, as the paper does.
    """

    name: ClassVar[str] = "tome"
    takes_block: ClassVar[bool] = True

    r: int | tuple[int, ...] = 8
    proportional: bool = True

    def __post_init__(self) -> None:
        check_flag("proportional", self.proportional)
        each = self.r if isinstance(self.r, (tuple, list)) else (self.r,)
        if not each or any(type(r) is not int or r < 0 for r in each):
            raise ValueError(f"r: expected an int from 0 on, or one a block, got {self.r!r}")
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))

    def refuses(self, tower: Tower) -> str | None:
        if tower.is_rotary:
            return "a pair that ToMe merges stands at two places, and a rotary block needs one"
        several = tower.num_prefix_tokens > 1
        return "of its prefix tokens ToMe protects the class token alone" if several else None

    def _each(self, size: Size) -> tuple[int, ...]:
        each = self.r if isinstance(self.r, tuple) else (self.r,) * size.depth
        if len(each) != size.depth:
            raise ValueError(f"r: expected {size.depth} numbers, one a block, got {len(each)}")
        return each

    def stages(self, size: Size) -> tuple[Stage, ...]:
        p = size.num_prefix_tokens
        counts = self.token_counts(size)
        stages = [Stage(i, 1, layer.mlp - p) for i, layer in enumerate(counts)]
        merges = [i for i, layer in enumerate(counts) if layer.mlp < layer.attention]
        return tuple(stages[merges[0] :]) if merges else ()  # sizes weigh in all that follow

    def token_counts(self, size: Size) -> tuple[Layer, ...]:
        each, p = self._each(size), size.num_prefix_tokens
        return counts_of(size, lambda i, tokens: tokens - min(each[i], (tokens - p) // 2))

    def scoring_flops(self, size: Size) -> int:
        channels = size.width // size.heads
        pairs = ((n + 1) // 2 * (n // 2) for n, m in self.token_counts(size) if m < n)
        return sum(2 * channels * each for each in pairs)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        i, before = stage.first, context.before
        sizes = None if before is None else before.sizes
        tokens, metric = context.run(self._attend, tower, i, tokens, sizes)
        r = tokens.shape[1] - tower.num_prefix_tokens - stage.keep
        if context.replay is not None:
            match = context.replay.reduction
            tokens, sizes = elip_kernels.merge_by(tokens, match, sizes)
        else:
            tokens, sizes, match = elip_kernels.bipartite_merge(
                tokens,
                metric,
                r,
                size=sizes,
                num_prefix_tokens=tower.num_prefix_tokens,
                return_info=True,
            )
        return context.run(tower.mlp, i, tokens), StageInfo(stage, match, sizes=sizes)

    def _attend(
        self, tower: Tower, i: int, tokens: Tensor, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Block i's attention half, and the metric (B, N, d) that tokens are matched by."""
        q, k, v = tower.qkv(i, tokens)
        bias = None
        if self.proportional and sizes is not None:
            bias = sizes.log().to(q.dtype)[:, None, None]
        return tower.attend(i, tokens, bias, qkv=(q, k, v)), k.detach().mean(1)

    def at_strength(self, size: Size, strength: float) -> Strategy:
        total = round(strength * size.depth * size.num_patches // 2)
        bounds = [total * i // size.depth for i in range(size.depth + 1)]
        return replace(self, r=tuple(b - a for a, b in pairwise(bounds)))


def counts_of(size: Size, left: Callable[[int, int], int]) -> tuple[Layer, ...]:
    """The layers, where `left(i, tokens)` of the tokens in block i go on to its MLP."""
    layers, tokens = [], size.num_tokens
    for i in range(size.depth):
        layers.append(Layer(tokens, left(i, tokens)))
        tokens = layers[-1].mlp
    return tuple(layers)


def least_share(size: Size) -> float:
    """Of the patches, so that one stays."""
    return min(1.0, 1.5 / size.num_patches)


def check_share(name: str, value: float) -> None:
    """Raises where it is no share in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float in (0, 1], got {value!r}")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}: expected a float in (0, 1], got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """Raises where it is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
