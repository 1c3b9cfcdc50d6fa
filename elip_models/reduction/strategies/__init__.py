"""The strategies by name. Each is frozen data, an argument of `encode_image` and `reduce_`: an
instance such as `ToMe(r=13)`, or the line of text that `get_strategy` reads.
"""

from elip_models.reduction.strategies.adaptive import Adaptive
from elip_models.reduction.strategies.baselines import PatchDropout, Random, Trips
from elip_models.reduction.strategies.complete_graph import CrossGET, PiToMe
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategies.elip import Elip
from elip_models.reduction.strategies.evit import EViT
from elip_models.reduction.strategies.guided_tome import GuidedToMe
from elip_models.reduction.strategies.resize import Resize
from elip_models.reduction.strategies.tome import ToMe
from elip_models.reduction.strategy import Strategy
from elip_models.towers import Tower

__all__ = [
    "STRATEGIES",
    "Adaptive",
    "CrossGET",
    "Dense",
    "EViT",
    "Elip",
    "GuidedToMe",
    "PatchDropout",
    "PiToMe",
    "Random",
    "Resize",
    "ToMe",
    "Trips",
    "default_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        *(Elip, EViT, ToMe, GuidedToMe, PiToMe, CrossGET),
        *(Trips, PatchDropout, Random, Resize, Adaptive),
    )
}


DEFAULT_KEEP = 0.7  # of a tower's tokens, mean over its layers


def default_strategy(tower: Tower, *, has_text: bool) -> Strategy:
    """What a tower is reduced by where nobody says: ToMe, of which no loss is seen (docs/study.md).

    Where ToMe refuses: ELIP, if a CLS token or the model's own text can score, or a random keep.
    """
    if ToMe().refuses(tower) is None:
        return ToMe().at_keep(tower, DEFAULT_KEEP)
    return Elip() if tower.has_cls or has_text else Random()
