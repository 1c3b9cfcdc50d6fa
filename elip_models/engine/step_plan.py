"""Where a strategy acts on a tower of some size, and how many tokens it leaves.

A forward pass reads the plan of its size, which is cached. A compiler traces `make_plan` instead.
"""

from functools import cache
from typing import NamedTuple

import torch

from elip_models.strategies.flops import inference_ratio
from elip_models.strategies.schedule import Stage
from elip_models.strategies.strategy import Strategy
from elip_models.towers import Tower, TowerSize
from elip_models.user_warnings import SlowScorerWarning, UnguidedWarning, warn_once


class StepPlan(NamedTuple):
    """The steps of a forward pass.

    stages: `strategy.stages` by first block.
    counts: the tokens that enter each block, and those that leave the last.
    """

    stages: dict[int, Stage]
    counts: tuple[int, ...]


def make_plan(strategy: Strategy, size: TowerSize) -> StepPlan:
    """Return the plan of a strategy for a tower of this size."""
    stages = {stage.first: stage for stage in strategy.stages(size)}
    entering = strategy.resized(size).num_tokens
    return StepPlan(stages, (entering, *(layer.mlp for layer in strategy.token_counts(size))))


cached_plan = cache(make_plan)
inference_cost = cache(inference_ratio)


def keeps_of(
    strategy: Strategy, tower: Tower, counts: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return the patches after each block of images of these numbers of patches, each alone."""
    size, table = tower.size, []
    for n in counts:
        stages, entering = cached_plan(strategy, size._replace(num_patches=n))
        patches = (entering[i] - size.num_prefix_tokens for i in range(size.depth))
        table.append(tuple(stages[i].keep if i in stages else n for i, n in enumerate(patches)))
    return tuple(table)


keeps_of._dynamo_marked_constant = True  # a graph has the result for every number of patches


def warn_of_cost(strategy: Strategy, cost: float) -> None:
    """Warn once that choosing the tokens costs more than dropping them saves."""
    scorer = getattr(strategy, "scorer", strategy.name)
    warn_once(
        f"scorer={scorer!r} makes inference cost {cost:.2f} times the dense tower "
        "(FLOPs of the blocks); scorer='last' costs less than dense",
        SlowScorerWarning,
    )


def warn_unguided() -> None:
    """Warn once that no text guides the images of a whole model."""
    if not torch.compiler.is_compiling():
        warn_once(
            "the images came alone, or with texts that nothing pairs with them, so they are "
            "reduced by the image alone (without_text='vision'); guidance(model, paired=True) "
            "lets each text of the call guide its image, guidance(model, text_cls) takes any "
            "text, without_text='dense' leaves the images as they were",
            UnguidedWarning,
        )
