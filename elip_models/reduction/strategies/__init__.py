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


def default_strategy(tower: Tower, *, has_text: bool) -> Strategy:
    """What a tower is reduced by where nobody says: ELIP, where its CLS token or the model's own
    text can score; else ToMe, or a random keep where ToMe refuses."""
    if tower.has_cls or has_text:
        return Elip()
    return ToMe() if ToMe().refuses(tower) is None else Random()
