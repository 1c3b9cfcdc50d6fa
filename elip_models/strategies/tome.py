"""ToMe: merge the most similar tokens in every block, between its attention and its MLP."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor
from typing import ClassVar, Literal

import torch
from torch import Tensor

import elip_kernels
from elip_kernels import BipartiteInfo, ReductionInfo
from elip_kernels.ops.bipartite import merge_pairs
from elip_kernels.ops.gather_ops import accumulator
from elip_models.strategies import nearness
from elip_models.strategies.flops import TokenCounts
from elip_models.strategies.schedule import Stage
from elip_models.strategies.shares import nearest_to
from elip_models.strategies.strategy import Context, StageInfo, Strategy, counts_of
from elip_models.towers import Tower, TowerSize
from elip_models.towers.merge import Merge
from elip_models.validation import Count, Rate, Reach, Share, check_fields


@dataclass(frozen=True)
class ToMe(Strategy):
    """Merge the r most similar pairs of tokens in every block (Bolya et al., ICLR 2023).

        attention with log(size) of each key added to its scores, then
        x, size = bipartite soft matching on this block's keys

    If blocks read positions, a merged token has one, see `position`.
    Rotary keys are compared as they are rotated.

    Attributes:
        r: how many tokens each block merges away: a number, a share of the image's patches, or one
            number per block. None: as many as `keep` requires.
        proportional: add log(size) to the attention scores, as the paper does.
        compare: the similarity of two tokens is the cosine of their keys, averaged over heads as in
            the paper ('mean_key'); of their keys of all heads ('keys'); or of the tokens
            themselves, after the attention ('tokens').
        keep_norm: scale each merged token to the largest norm of its tokens, as MLERP does (Kim et
            al., Token Fusion, WACV 2024); a mean of tokens is shorter than they are.
        class_token_only: the last block computes only the class token and other prefix tokens,
            whose values do not change. For models that read no patch of the last block.
        position: the position of a merged token, where blocks rotate by it: that of the token that
            others merged into ('kept'), or the mean by size ('mean'), whose rotation is computed.
        decrease: the first block merges 1 + decrease times as many tokens as the mean block, the
            last one 1 - decrease times, and the others between them: 0 is the constant schedule of
            the paper, 1 its decreasing one. No effect on one number per block.
        reach: prefer partners that are near in the image. At this distance, in patches, at least
            0.5, the similarity of two tokens is 1 less than their cosine, and the loss grows with
            the squared distance. None: distance has no effect. For images of the model's own size.
    """

    name: ClassVar[str] = "tome"
    summary: ClassVar[str] = "merges the tokens with the most similar keys"
    place: ClassVar[str] = "every block"
    keep_field: ClassVar[str | None] = "r"
    replaces_block: ClassVar[bool] = True
    takes_padding: ClassVar[bool] = True
    merge: ClassVar[Merge] = "nearest"

    r: Count | Rate | tuple[Count, ...] | None = None
    proportional: bool = True
    compare: Literal["mean_key", "keys", "tokens"] = "mean_key"
    keep_norm: bool = False
    class_token_only: bool = False
    position: Literal["kept", "mean"] = "kept"
    decrease: Share = 0.0
    reach: Reach | None = None

    @property
    def drops_patches(self) -> bool:
        """Whether the last block returns only the class token."""
        return self.class_token_only

    def __post_init__(self) -> None:
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        check_fields(self)

    def why_unsupported(self, tower: Tower) -> str | None:
        reason = tower.refuses_mean_positions() if self.position == "mean" else None
        if reason is not None:
            return f"position='mean': {reason}"
        if self.reach is not None and (reason := self._refuses_reach(tower)) is not None:
            return f"reach: {reason}"
        if self.class_token_only and (tower.pools or not tower.has_cls):
            return "class_token_only: the model uses the patches of the last block"
        return tower.refuses_dropping() if self.class_token_only else None

    def _refuses_reach(self, tower: Tower) -> str | None:
        """Return why distances in the image are unknown, in one sentence, or None if known."""
        if tower.takes_padding:
            return "images of one batch may have other grids of patches"
        size = self.resized(tower.size)
        is_grid = math.prod(size.grid) == size.num_patches
        return None if tower.num_steps == 1 and is_grid else "its patches are no grid of an image"

    def _merged_per_block(self, size: TowerSize) -> tuple[int, ...]:
        """Return how many tokens each block merges away."""
        r, depth = self.with_rate(size).r, size.depth
        if isinstance(r, tuple):
            if len(r) != depth:
                raise ValueError(f"r: expected {depth} numbers, one a block, got {len(r)}")
            return r
        total = nearest_to(r, depth * size.num_patches) if isinstance(r, float) else r * depth
        slope = self.decrease / max(depth - 1, 1)
        bounds = [floor(total * i / depth * (1 + slope * (depth - i))) for i in range(depth + 1)]
        return tuple(b - a for a, b in pairwise(bounds))

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return one stage per block, from the first that merges."""
        p = size.num_prefix_tokens
        counts = self.token_counts(size)
        stages = [Stage(i, 1, layer.mlp - p) for i, layer in enumerate(counts)]
        merges = [i for i, layer in enumerate(counts) if layer.mlp < layer.attention]
        return tuple(stages[merges[0] :]) if merges else ()  # all later blocks need the sizes

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return the tokens in each block, of which at most half of the patches merge away."""
        r, p = self._merged_per_block(size), size.num_prefix_tokens

        def left(i: int, tokens: int) -> int:
            if self.is_final(i, size.depth):
                return p
            return tokens - min(r[i], (tokens - p) // 2)

        return counts_of(size, left)

    def block_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of all blocks; in a final one, only the prefix tokens attend."""
        *others, last = self.token_counts(size)
        flops = sum(size.block_flops(*layer) for layer in others)
        is_final = self.is_final(size.depth - 1, size.depth)
        return flops + size.block_flops(*last, queries=last.mlp if is_final else None)

    def is_final(self, i: int, depth: int) -> bool:
        """Return whether block i computes only the class token."""
        return self.class_token_only and i == depth - 1

    def merging_counts(self, size: TowerSize) -> list[int]:
        """Return the number of tokens that enter each block that merges."""
        counts = enumerate(self.token_counts(size))
        return [n for i, (n, m) in counts if m < n and not self.is_final(i, size.depth)]

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of comparing the keys."""
        left = max(size.num_prefix_tokens - 1, 0)  # out of the comparison
        counts = (n - left for n in self.merging_counts(size))
        pairs = sum((n + 1) // 2 * (n // 2) for n in counts)
        return 2 * self.channels(size) * pairs

    def channels(self, size: TowerSize) -> int:
        """Return the number of channels that are compared."""
        channels = size.width // size.heads if self.compare == "mean_key" else size.width
        return channels if self.reach is None else channels + nearness.CHANNELS

    def compared(self, tokens: Tensor, keys: Tensor) -> Tensor:
        """Return what is compared, (B, N, C), of tokens (B, N, D) with keys (B, H, N, d)."""
        if self.compare == "tokens":
            return tokens.detach()
        return keys.mean(1) if self.compare == "mean_key" else keys.transpose(1, 2).flatten(2)

    def scaled(
        self, merged: Tensor, tokens: Tensor, match: BipartiteInfo, mask: Tensor | None = None
    ) -> Tensor:
        """Return merged tokens (B, R, D) of tokens (B, N, D), with their norms if `keep_norm`.

        `mask` (B, N) is False for padding.
        """
        if not self.keep_norm or merged.shape == tokens.shape:
            return merged
        dtype = accumulator(tokens)
        norms = torch.linalg.vector_norm(tokens, dim=2, dtype=dtype)
        norms = norms if mask is None else norms * mask
        largest = norms.new_zeros(merged.shape[:2])
        largest = largest.scatter_reduce(1, match.slots.long(), norms, "amax")
        now = torch.linalg.vector_norm(merged, dim=2, dtype=dtype)
        factor = largest / now.clamp(min=torch.finfo(dtype).tiny)
        return merged * factor.to(merged.dtype)[..., None]

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Run block `stage.first`, with a merge between its attention and its MLP."""
        i, p = stage.first, tower.num_prefix_tokens
        sizes = sizes_of(tokens, context)
        if self.is_final(i, tower.depth):
            return self._final(tower, stage, tokens, context)
        N = tokens.shape[1]
        N = int(N) if isinstance(N, Tensor) else N  # of torch.jit.trace
        r, penalty, lengths = N - p - stage.keep, None, None
        if r > 0 and context.replay is None:
            penalty = self.penalty(tower, i, tokens, context)
        if context.mask is not None:
            lengths = context.mask.sum(1)
        attended, keys = self._attend(tower, i, tokens, context)
        before, places = sizes, self._places(tower, attended, context)
        if context.replay is not None:
            match = context.replay.reduction
            merged, sizes = elip_kernels.apply_merge(attended, match, size=sizes)
        else:
            merged, sizes, match = merge_pairs(
                attended,
                self._metric(tower, attended, keys, places),
                r,
                size=sizes,
                penalty=penalty,
                lengths=lengths,
                merges=None if lengths is None else lengths - p - context.keep,
                num_prefix_tokens=p,
            )
        tokens = self.scaled(merged, attended, match, context.mask)
        positions = None
        if self.position == "mean":
            positions = tower.mean_positions(match, before, accumulator(tokens))
        elif tower.has_positions:
            positions = self.merged_positions(tower, match, context.mask)
        if places is not None:
            places = elip_kernels.apply_merge(places, match, size=before)[0]
        info = StageInfo(
            stage,
            match,
            sizes=sizes,
            positions=positions,
            places=places,
            shift=context.shift(attended, tokens, match),
        )
        return tower.mlp(i, tokens), info

    def _places(self, tower: Tower, tokens: Tensor, context: Context) -> Tensor | None:
        """Return the row and column (B, N, 2) of each token that enters a block, if `reach`."""
        if self.reach is None or context.previous is not None:
            return None if context.previous is None else context.previous.places
        size, (B, N, _) = self.resized(tower.size), tokens.shape
        if size.num_tokens != N:
            height, width = size.image
            raise ValueError(
                f"reach: expected images of {height} x {width} pixels, whose {size.num_patches} "
                f"patches have known places, got {N - size.num_prefix_tokens} patches; open the "
                "model for this size, or leave out reach"
            )
        places = nearness.patch_places(size.grid, size.num_prefix_tokens, tokens)
        return places.expand(B, -1, -1)

    def _metric(self, tower: Tower, tokens: Tensor, keys: Tensor, places: Tensor | None) -> Tensor:
        """Return what the matching compares (B, N, C): features, and places if there are any."""
        metric = self.compared(tokens, keys)
        if self.reach is None or places is None:
            return metric
        grid = self.resized(tower.size).grid
        return nearness.with_nearness(metric, places, grid, self.reach)

    def merged_positions(
        self, tower: Tower, match: BipartiteInfo, mask: Tensor | None = None
    ) -> Tensor | None:
        """Return the positions of the remaining patches: of B, and of A where it did not merge.

        `mask` (B, N) is False for padding.
        """
        (B, N), R, p = match.slots.shape, match.num_rows, tower.num_prefix_tokens
        tokens = torch.arange(N, device=match.slots.device).expand(B, -1)
        slots = match.slots.long()
        slots = slots if mask is None else slots.masked_fill(~mask, R)
        of_a, of_b = slice(max(p - 1, 0), None, 2), slice(p or 1, None, 2)
        kept = tokens.new_full((B, R + 1), p)  # padding has the position of some patch
        kept = kept.scatter(1, slots[:, of_a], tokens[:, of_a])
        kept = kept.scatter(1, slots[:, of_b], tokens[:, of_b])
        return tower.positions_of(kept[:, p:R])

    def _final(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Run the last block for the prefix tokens, which attend to all tokens."""
        i = stage.first
        q, k, v = tower.qkv(i, tokens)
        p = tower.num_prefix_tokens
        first = tower.attend(i, tokens[:, :p], self._bias(q, context), qkv=(q[:, :, :p], k, v))
        none = tokens.new_empty(tokens.shape[0], 0, dtype=torch.long)
        weights = tokens.new_zeros(tokens.shape[:2], dtype=accumulator(tokens))
        dropped = ReductionInfo(none, weights, None, tower.num_prefix_tokens, merged=False)
        return tower.mlp(i, first), StageInfo(stage, dropped)

    def penalty(self, tower: Tower, i: int, tokens: Tensor, context: Context) -> Tensor | None:
        """Return (B, N) to subtract from the similarity of each token that enters block i.

        Tokens (B, N, D) with a large penalty merge last. None means no penalty.
        """
        return None

    def _attend(
        self, tower: Tower, i: int, tokens: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Return the output of block i's attention, and its detached keys (B, H, N, d)."""
        q, k, v = tower.qkv(i, tokens)
        bias = self._bias(q, context)
        return tower.attend(i, tokens, bias, qkv=(q, k, v)), k.detach()

    def _bias(self, q: Tensor, context: Context) -> Tensor | None:
        """Return what is added to the attention scores of each key, -inf for padding."""
        sizes, mask = sizes_of(q, context), context.mask
        if self.proportional and sizes is not None:
            return sizes.log().to(q.dtype)[:, None, None]
        if mask is None:
            return None
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        return bias[:, None, None]

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        """Return the strategy with r as a share of the patches, evenly over the blocks."""
        patches = size.depth * size.num_patches  # over all blocks; half of them can merge
        return replace(self, r=round(strength * patches // 2) / patches)


def sizes_of(like: Tensor, context: Context) -> Tensor | None:
    """Return the sizes (B, N) of the tokens of a step, 0 for padding; None means 1 for each."""
    if context.previous is not None:
        return context.previous.sizes
    return None if context.mask is None else context.mask.to(accumulator(like))
