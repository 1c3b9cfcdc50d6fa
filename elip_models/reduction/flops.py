"""FLOPs of a tower under a strategy, by its token counts: no tensor, no run.

    forward  = embed + sum over blocks of 4 n D (2 D + n) + 4 m D F + scoring
    training = 2 embed + 3 (sum over blocks) + scoring

of one image; n tokens go through a block's attention, m through its MLP of width F. Backward is
twice the forward: a product for the input and one for the weight, of which the embedding needs one.
Softmax, norms and moves of tokens are not counted.
"""

from typing import TYPE_CHECKING, NamedTuple

from elip_models.reduction.once import once
from elip_models.towers import Size
from elip_models.validation import PositiveShare, check

if TYPE_CHECKING:
    from elip_models.reduction.strategy import Strategy

TOLERANCE = 0.01  # of the share that `at_flops` is asked for


class Flops(NamedTuple):
    """Of one image, scorer included."""

    forward: int
    training: int


def dense_flops(size: Size) -> Flops:
    """Of the tower as it is."""
    n = size.num_tokens
    return _flops(size.embed_flops(), size.depth * size.block_flops(n, n), 0)


@once
def strategy_flops(strategy: "Strategy", size: Size) -> Flops:
    """Of the tower under `strategy`, where it reduces."""
    blocks = sum(size.block_flops(*layer) for layer in strategy.token_counts(size))
    return _flops(strategy.embed_flops(size), blocks, strategy.scoring_flops(size))


def _flops(embed: int, blocks: int, scoring: int) -> Flops:
    return Flops(embed + blocks + scoring, 2 * embed + 3 * blocks + scoring)


def training_ratio(strategy: "Strategy", size: Size) -> float:
    """FLOPs of a training step against the dense tower's."""
    return strategy_flops(strategy, size).training / dense_flops(size).training


def inference_ratio(strategy: "Strategy", size: Size) -> float:
    """FLOPs of a forward against the dense tower's."""
    return strategy_flops(strategy, size).forward / dense_flops(size).forward


def nearest(strategy: "Strategy", size: Size, ratio: float, *, exactly: bool = True) -> "Strategy":
    """The strategy at the strength whose training FLOPs are nearest to `ratio` of dense.

    exactly: an error where that is not within `TOLERANCE`.
    """
    check("ratio", ratio, PositiveShare)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if training_ratio(strategy.at_strength(size, middle), size) > ratio:
            low = middle
        else:
            high = middle
    found = [strategy.at_strength(size, strength) for strength in (0.0, low, high)]
    best = min(found, key=lambda each: abs(training_ratio(each, size) - ratio))
    reached = training_ratio(best, size)
    if exactly and abs(reached / ratio - 1) > TOLERANCE:
        raise ValueError(
            f"ratio: expected a share of the dense training FLOPs that {strategy.name!r} can "
            f"reach within {TOLERANCE:.0%}, got {ratio}; the nearest is {reached:.4f}"
        )
    return best
