"""PiToMe and CrossGET: merging in every block, where any patch may merge into any other.

ToMe's patches may merge only into a fixed half. PiToMe protects patches that are unlike all others,
CrossGET those that a text attends to.

    S   = cosines of the patches' keys in this block, (B, n, n)
    each of r sources merges into a target, which is no source; both are chosen by S
    x_t = (sum of weight_n size_n x_n) / (sum of size_n)         over target t and its sources

All tokens but the sources stay, in image order. The choice has no gradient. S is stored, n x n for
each image, and the pairs are chosen by PyTorch; `apply_merge` computes the sums.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import elip_kernels
from elip_kernels import BipartiteInfo
from elip_kernels.ops.gather_ops import accumulator, cosines, largest
from elip_models.reduction.schedule import Stage
from elip_models.reduction.strategies.elip import ELIP, Guided, fused_cls
from elip_models.reduction.strategies.tome import ToMe
from elip_models.reduction.strategy import Context, StageInfo
from elip_models.towers import Tower, TowerSize
from elip_models.towers.base import scoring_context
from elip_models.validation import Share


class Pairs(NamedTuple):
    """Sources and their targets, indices (B, r) of N tokens; weights (B, N), None means 1."""

    sources: Tensor
    targets: Tensor
    weights: Tensor | None = None

    def behind(self, p: int) -> "Pairs":
        """Return the pairs with indices shifted by p prefix tokens, which do not merge."""
        weights = None if self.weights is None else F.pad(self.weights, (p, 0), value=1.0)
        return Pairs(self.sources + p, self.targets + p, weights)

    def match(self, N: int) -> BipartiteInfo:
        """Return the output row of each of N tokens."""
        rows = (~self._is_source(N)).cumsum(1, dtype=torch.int32) - 1
        slots = rows.scatter(1, self.sources, rows.gather(1, self.targets))
        return BipartiteInfo(slots, N - self.sources.shape[1])

    def kept(self, N: int) -> Tensor:
        """Return the indices (B, N-r) of the tokens that are no sources, ascending."""
        order = self._is_source(N).to(torch.uint8).argsort(dim=1, stable=True)
        return order[:, : N - self.sources.shape[1]]

    def _is_source(self, N: int) -> Tensor:
        sources = self.sources
        none = torch.zeros(sources.shape[0], N, dtype=torch.bool, device=sources.device)
        return none.scatter(1, sources, 1)


class Attention(NamedTuple):
    """Tokens (B, N, D) before and after the attention of a block, and its keys (B, H, N, d)."""

    before: Tensor
    after: Tensor
    keys: Tensor


class CompleteGraph(ToMe):
    """ToMe with pairs of a complete graph. A subclass defines `choose`."""

    takes_padding: ClassVar[bool] = False

    def choose(
        self, tower: Tower, stage: Stage, attention: Attention, text_cls: Tensor | None
    ) -> Pairs:
        """Return the pairs that leave `stage.keep` patches after this attention."""
        raise NotImplementedError

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of the cosines in every block that merges."""
        patches = (n - size.num_prefix_tokens for n in self.merging_counts(size))
        return sum(2 * n * n * self.channels(size) for n in patches)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        """Run block `stage.first`, with a merge between its attention and its MLP."""
        (B, N, _), entered, previous = tokens.shape, tokens, context.previous
        is_final = self.is_final(stage.first, tower.depth)
        if is_final or N - tower.num_prefix_tokens == stage.keep:
            return super().step(tower, stage, tokens, context)
        sizes = None if previous is None else previous.sizes
        tokens, keys = self._attend(tower, stage.first, tokens, context)
        if context.replay is not None:
            match, weights = context.replay.reduction, context.replay.weights
            positions = context.replay.positions
        else:
            with scoring_context(tower.model, entered):
                attention = Attention(entered, tokens, keys)
                pairs = self.choose(tower, stage, attention, context.text_cls)
            match, weights = pairs.match(N), pairs.weights
            positions = None
            if self.position == "mean":
                positions = tower.mean_positions(match, sizes, accumulator(tokens))
            elif tower.has_positions:
                positions = tower.positions_of(pairs.kept(N)[:, tower.num_prefix_tokens :])
        if sizes is None:
            sizes = tokens.new_ones(B, N, dtype=accumulator(tokens))
        rows, sizes = merged(tokens, sizes, match, weights)
        info = StageInfo(stage, match, sizes=sizes, positions=positions, weights=weights)
        return tower.mlp(stage.first, self.scaled(rows, tokens, match)), info


@dataclass(frozen=True)
class PiToMe(CompleteGraph):
    """Merge the r patches of the highest energy into the next r (Tran et al., NeurIPS 2024).

        E_i = mean_j elu(S_ij - m), m = margin (1 - block / depth)           S of what is compared
        sources and targets alternate among the 2 r of the highest E
        a source merges into the most similar target

    A patch that is similar to many others has a high energy; the rest is protected.

    Attributes:
        r, proportional, compare, keep_norm, class_token_only, position: as of `ToMe`.
        margin: m in the first block, from which it decreases linearly.
    """

    name: ClassVar[str] = "pitome"
    summary: ClassVar[str] = "merges patches that are similar to many others"

    margin: Share = 0.9

    def choose(
        self, tower: Tower, stage: Stage, attention: Attention, text_cls: Tensor | None
    ) -> Pairs:
        """Return the pairs by energy."""
        p = tower.num_prefix_tokens
        similarity = cosines(self.compared(attention.after, attention.keys)[:, p:])
        margin = self.margin * (1 - stage.first / tower.depth)
        return pairs_by_energy(similarity, similarity.shape[1] - stage.keep, margin).behind(p)


@dataclass(frozen=True)
class CrossGET(Guided, CompleteGraph):
    """Merge similar tokens that the text does not attend to (CrossGET, Shi et al., ICML 2024).

        I_i = cosine of key i and the query of the fused CLS token           S of what is compared
        B_i = the largest S_ij over the j whose own largest similarity is lower than that of i
        sources = the r of the largest B - I; each merges into the most similar that is no source
        weights = of a source s 2 w_s, of its target 1 + sum over its sources of (2 w_t - 1)
                  with (w_s, w_t) = softmax(I_s, I_t)

    The paper learns tokens that represent the other modality. Here the query is the fused CLS token
    of ELIP (Eq. 1), which is none of the tokens of a layer.

    Attributes:
        r, proportional, compare, keep_norm, class_token_only, position: as of `ToMe`; the paper
            compares 'keys'.
        fusion, guidance_norm, without_text: as of `ELIP`.
    """

    name: ClassVar[str] = "crossget"
    summary: ClassVar[str] = "merges similar patches with low CLS attention"

    compare: Literal["mean_key", "keys", "tokens"] = "keys"
    fusion: Share = ELIP.fusion
    guidance_norm: Literal["none", "match"] = ELIP.guidance_norm
    without_text: Literal["dense", "vision"] | None = ELIP.without_text

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of the cosines, and of the query and its cosines."""
        D, p = size.width, size.num_prefix_tokens
        rows = (2 * (n - p) + 1 for n in self.merging_counts(size))
        return super().scoring_flops(size) + sum(6 * D * D + 2 * row * D for row in rows)

    def choose(
        self, tower: Tower, stage: Stage, attention: Attention, text_cls: Tensor | None
    ) -> Pairs:
        """Return the pairs by similarity and importance."""
        p = tower.num_prefix_tokens
        cls = fused_cls(tower, attention.before, text_cls, self)
        query = tower.at_no_position().qkv(stage.first, cls[:, None])[0]
        both = torch.cat([query, attention.keys[:, :, p:]], dim=2).transpose(1, 2).flatten(2)
        similarity = cosines(both)  # (B, 1 + n, 1 + n)
        importance, similarity = similarity[:, 0, 1:], similarity[:, 1:, 1:]
        if self.compare != "keys":
            similarity = cosines(self.compared(attention.after, attention.keys)[:, p:])
        r = similarity.shape[1] - stage.keep
        return pairs_by_importance(similarity, importance, r).behind(p)


def pairs_by_energy(similarity: Tensor, r: int, margin: float) -> Pairs:
    """Return PiToMe's pairs by S (B, n, n)."""
    order = largest(F.elu(similarity - margin).mean(2), 2 * r)
    sources, targets = order[:, ::2], order[:, 1::2]
    rows = similarity.gather(1, sources[..., None].expand(-1, -1, similarity.shape[2]))
    best = rows.gather(2, targets[:, None].expand(-1, r, -1)).argmax(2)
    return Pairs(sources, targets.gather(1, best))


def pairs_by_importance(similarity: Tensor, importance: Tensor, r: int) -> Pairs:
    """Return CrossGET's pairs by S (B, n, n) and I (B, n)."""
    n, never = similarity.shape[1], float("-inf")
    similarity = torch.maximum(similarity, similarity.mT)  # a pair is one cosine
    itself = torch.eye(n, dtype=torch.bool, device=similarity.device)
    similarity = similarity.masked_fill(itself, never)
    rank = largest(similarity.amax(2), n).argsort(1)
    is_later = rank[:, None] > rank[:, :, None]
    best = similarity.masked_fill(~is_later, never).amax(2)
    sources = largest(best - importance, r)
    rows = similarity.gather(1, sources[..., None].expand(-1, -1, n))
    is_source = torch.zeros_like(is_later[:, 0]).scatter(1, sources, 1)
    targets = rows.masked_fill(is_source[:, None], never).argmax(2)
    both = torch.stack([importance.gather(1, sources), importance.gather(1, targets)], dim=2)
    of_source, of_target = (2 * both.softmax(2)).unbind(2)
    weights = torch.ones_like(importance).scatter(1, sources, of_source)
    return Pairs(sources, targets, weights.scatter_add(1, targets, of_target - 1))


def merged(
    tokens: Tensor, sizes: Tensor, match: BipartiteInfo, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return merged tokens (B, R, D) and sizes (B, R) of tokens, sizes and weights (B, N)."""
    if weights is not None:
        tokens = tokens * weights.to(tokens.dtype)[..., None]
    return elip_kernels.apply_merge(tokens, match, size=sizes)
