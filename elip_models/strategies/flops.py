"""FLOPs of a tower under a strategy, computed from token counts without running the tower.

    forward  = embed + sum over blocks of 4 n D (2 D + n) + 4 m D F + scoring
    training = 2 embed + 3 (sum over blocks) + scoring

Both are for one image: n tokens enter a block's attention, m enter its MLP of width F. A backward
pass costs twice its forward pass, for the products of input and weight; the embedding has only the
second. Softmax, norms and copies of tokens are not counted.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from elip_models.towers import TowerSize
from elip_models.validation import PositiveShare, check, mismatch_error, plain_number, shortened

S = TypeVar("S", bound="CostModel")

DEFAULT_KEEP = 0.7
"""The rate of every strategy whose rate is not set: the mean share of tokens over the layers."""
TOLERANCE = 0.01  # relative to the target of `at_flops` and `at_keep`


class TokenCounts(NamedTuple):
    """The numbers of tokens in a block: through its attention, and through its MLP."""

    attention: int
    mlp: int


class Flops(NamedTuple):
    """FLOPs of one image in inference and in a training step, scorer included."""

    forward: int
    training: int


class CostModel:
    """The part of a strategy that determines its cost: token counts and FLOPs of scoring.

    Attributes:
        training_only: the strategy reduces nothing in inference.
    """

    training_only: ClassVar[bool] = False

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return the tokens in each block, prefix and merged tokens included; FLOPs follow."""
        raise NotImplementedError

    def block_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of all blocks in the forward pass of one image, without scoring."""
        return sum(size.block_flops(*layer) for layer in self.token_counts(size))

    def scoring_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of choosing the tokens of one image, which run without gradient."""
        return 0

    def embed_flops(self, size: TowerSize) -> int:
        """Return the FLOPs of the patch embedding of one image."""
        return size.embed_flops()

    def at_strength(self, size: TowerSize, strength: float) -> Self:
        """Return the strategy at a strength from 0 (reduces nothing) to 1 (as much as it can).

        The cost must not rise with the strength: `at_flops` and `at_keep` search over it.
        """
        raise NotImplementedError


def dense_flops(size: TowerSize) -> Flops:
    """Return the FLOPs of the tower without reduction."""
    n = size.num_tokens
    return _flops(size.embed_flops(), size.depth * size.block_flops(n, n), 0)


def strategy_flops(strategy: CostModel, size: TowerSize) -> Flops:
    """Return the FLOPs of the tower under `strategy`, in inference and in a training step."""
    blocks = strategy.block_flops(size)
    flops = _flops(strategy.embed_flops(size), blocks, strategy.scoring_flops(size))
    return flops._replace(forward=dense_flops(size).forward) if strategy.training_only else flops


def _flops(embed: int, blocks: int, scoring: int) -> Flops:
    return Flops(embed + blocks + scoring, 2 * embed + 3 * blocks + scoring)


def training_ratio(strategy: CostModel, size: TowerSize) -> float:
    """Return the FLOPs of a training step as a share of the dense tower's."""
    return strategy_flops(strategy, size).training / dense_flops(size).training


def inference_ratio(strategy: CostModel, size: TowerSize) -> float:
    """Return the FLOPs of a forward pass as a share of the dense tower's."""
    return strategy_flops(strategy, size).forward / dense_flops(size).forward


def kept_share(strategy: CostModel, size: TowerSize) -> float:
    """Return the mean share of the dense tower's tokens, over attention and MLP of all blocks."""
    counts = strategy.token_counts(size)
    return sum(layer.attention + layer.mlp for layer in counts) / (2 * size.depth * size.num_tokens)


def most_kept(strategy: CostModel, size: TowerSize) -> float:
    """Return the mean share of the tokens that the strategy leaves at its weakest."""
    return kept_share(strategy.at_strength(size, 0.0), size)


def at_flops(
    strategy: S, size: TowerSize, ratio: float, *, training: bool = True, exactly: bool = True
) -> S:
    """Return the strategy at the strength whose FLOPs are nearest to `ratio` of dense.

    Args:
        strategy: the strategy to set.
        size: the tower's size.
        ratio: the target in (0, 1].
        training: count a training step; False counts a forward pass.
        exactly: raise if the result differs by more than `TOLERANCE`.

    Raises:
        ValueError: a ratio that the strategy cannot reach, with the nearest that it can.
    """
    ratio = check("ratio", ratio, PositiveShare)
    share = training_ratio if training else inference_ratio
    best = _nearest(strategy, size, ratio, share)
    reached = share(best, size)
    if exactly and abs(reached / ratio - 1) > TOLERANCE:
        what = "training" if training else "forward"
        raise ValueError(
            f"ratio: expected a share of the dense {what} FLOPs that {strategy} can reach within "
            f"{TOLERANCE:.0%} in a tower of {size.depth} layers, got {ratio}; the nearest is "
            f"{reached:.4f}"
        )
    return best


def at_keep(strategy: S, size: TowerSize, keep: float) -> S:
    """Return the strategy at the strength that leaves nearest to `keep` of the tokens.

    Raises:
        TypeError, ValueError: no share, or one that the strategy cannot leave.
    """
    keep = check_share(keep)
    most = most_kept(strategy, size)
    if keep > most * (1 + TOLERANCE):
        raise ValueError(
            f"keep: expected at most {most:.3f}, what {strategy} leaves of the tokens at its "
            f"weakest, got {keep}; pass a smaller keep, or leave its other options unset"
        )
    best = _nearest(strategy, size, keep, kept_share)
    least = kept_share(strategy.at_strength(size, 1.0), size)
    if keep < least * (1 - TOLERANCE):
        raise ValueError(
            f"keep: expected at least {least:.3f}, what {strategy} leaves of the tokens at its "
            f"strongest, on average over the {size.depth} layers, got {keep}; pass "
            f"{math.ceil(least * 1000) / 1000} or more"
            f"{', or earlier blocks as layers' * hasattr(strategy, 'layers')}"
        )
    return best


def check_share(keep: Any) -> float | None:
    """Return `keep`, a share of the tokens, as a number of Python, or None.

    Raises:
        TypeError, ValueError: another value. An integer is one: a strategy of a language model
            takes it as a number of tokens.
    """
    keep = plain_number(keep)
    if isinstance(keep, int) and not isinstance(keep, bool):
        error, got = TypeError, f"the integer {shortened(keep)}"
    else:
        error, got = mismatch_error(keep, PositiveShare | None), shortened(keep)
    if error is not None:
        raise error(
            "keep: expected a float in (0, 1], the mean share of the tokens over the layers, got "
            f"{got}; pass {share_for(keep)} of the tokens"
        )
    return keep


def share_for(keep: Any) -> str:
    """Return the share that a refused `keep` may mean, in words: '0.7 for 70%'."""
    if isinstance(keep, int) and keep == 1:
        return "1.0 for all"
    try:
        number = float(str(keep).strip().removesuffix("%"))
    except ValueError:
        number = math.nan
    is_percent = 10 <= number <= 100  # 2 may be a number of tokens
    share = number / 100 if is_percent else number
    return f"{share:g} for {share:.0%}" if 0 < share <= 1 else "0.5 for half"


def _nearest(
    strategy: S, size: TowerSize, target: float, share: Callable[[CostModel, TowerSize], float]
) -> S:
    """Return the strategy at the strength whose `share` is nearest to `target`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if share(strategy.at_strength(size, middle), size) > target:
            low = middle
        else:
            high = middle
    nearby = [strategy.at_strength(size, strength) for strength in (0.0, low, high)]
    return min(nearby, key=lambda strategy: abs(share(strategy, size) - target))
