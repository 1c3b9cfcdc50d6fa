"""FLOPs of a tower under a strategy, by its token counts: no tensor, no run.

    forward  = embed + sum over blocks of 4 n D (2 D + n) + 4 m D F + scoring
    training = 2 embed + 3 (sum over blocks) + scoring

of one image; n tokens go through a block's attention, m through its MLP of width F. Backward is
twice the forward: a product for the input and one for the weight, of which the embedding needs one.
Softmax, norms and moves of tokens are not counted.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from elip_models.reduction.caching import once
from elip_models.towers import TowerSize
from elip_models.validation import PositiveShare, check

if TYPE_CHECKING:
    from elip_models.reduction.strategy import Strategy

S = TypeVar("S", bound="Strategy")

TOLERANCE = 0.01  # of the share that `at_flops` or `at_keep` is asked for


class Flops(NamedTuple):
    """Of one image, scorer included."""

    forward: int
    training: int


def dense_flops(size: TowerSize) -> Flops:
    """Of the tower as it is."""
    n = size.num_tokens
    return _flops(size.embed_flops(), size.depth * size.block_flops(n, n), 0)


@once
def strategy_flops(strategy: "Strategy", size: TowerSize) -> Flops:
    """Of the tower under `strategy`, where it reduces."""
    blocks = sum(size.block_flops(*layer) for layer in strategy.token_counts(size))
    return _flops(strategy.embed_flops(size), blocks, strategy.scoring_flops(size))


def _flops(embed: int, blocks: int, scoring: int) -> Flops:
    return Flops(embed + blocks + scoring, 2 * embed + 3 * blocks + scoring)


def training_ratio(strategy: "Strategy", size: TowerSize) -> float:
    """FLOPs of a training step against the dense tower's."""
    return strategy_flops(strategy, size).training / dense_flops(size).training


def inference_ratio(strategy: "Strategy", size: TowerSize) -> float:
    """FLOPs of a forward against the dense tower's."""
    return strategy_flops(strategy, size).forward / dense_flops(size).forward


def kept_share(strategy: "Strategy", size: TowerSize) -> float:
    """Tokens of a block against the dense tower's, mean over the blocks and both their halves."""
    counts = strategy.token_counts(size)
    return sum(layer.attention + layer.mlp for layer in counts) / (2 * size.depth * size.num_tokens)


def at_flops(
    strategy: S, size: TowerSize, ratio: float, *, training: bool = True, exactly: bool = True
) -> S:
    """The strategy at the strength whose FLOPs are nearest to `ratio` of dense.

    training: of a training step; else of a forward.
    exactly: an error where that is not within `TOLERANCE`.
    """
    check("ratio", ratio, PositiveShare)
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
    """The strategy at the strength that leaves nearest to `keep` of the tokens."""
    check("keep", keep, PositiveShare)
    best = _nearest(strategy, size, keep, kept_share)
    least = kept_share(strategy.at_strength(size, 1.0), size)
    if keep < least * (1 - TOLERANCE):
        raise ValueError(
            f"keep: expected at least {least:.3f}, what {strategy} leaves of the tokens at its "
            f"strongest, on average over the {size.depth} layers, got {keep}; reduce in earlier "
            "layers to keep less"
        )
    return best


def _nearest(
    strategy: S, size: TowerSize, target: float, share: Callable[["Strategy", TowerSize], float]
) -> S:
    """The strategy at the strength whose `share`, which falls with it, is nearest to `target`."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if share(strategy.at_strength(size, middle), size) > target:
            low = middle
        else:
            high = middle
    found = [strategy.at_strength(size, strength) for strength in (0.0, low, high)]
    return min(found, key=lambda each: abs(share(each, size) - target))
