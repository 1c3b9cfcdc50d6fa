"""The strategies by name. Each is frozen data, an argument of `encode_image` and `reduce_`: an
instance such as `ToMe(r=13)`, or the line of text that `get_strategy` reads.
"""

from elip_models.reduction.flops import kept_share
from elip_models.reduction.strategies.adaptive import AdaptiveELIP
from elip_models.reduction.strategies.baselines import TRIPS, PatchDropout, RandomPruning
from elip_models.reduction.strategies.complete_graph import CrossGET, PiToMe
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategies.elip import ELIP
from elip_models.reduction.strategies.evit import EViT
from elip_models.reduction.strategies.guided_tome import GuidedToMe
from elip_models.reduction.strategies.resize import ImageResize
from elip_models.reduction.strategies.tome import ToMe
from elip_models.reduction.strategy import Strategy
from elip_models.towers import Tower

__all__ = [
    "ELIP",
    "STRATEGIES",
    "TRIPS",
    "AdaptiveELIP",
    "CrossGET",
    "Dense",
    "EViT",
    "GuidedToMe",
    "ImageResize",
    "PatchDropout",
    "PiToMe",
    "RandomPruning",
    "ToMe",
    "default_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        *(ELIP, EViT, ToMe, GuidedToMe, PiToMe, CrossGET),
        *(TRIPS, PatchDropout, RandomPruning, ImageResize, AdaptiveELIP),
    )
}


DEFAULT_KEEP = 0.7  # of the tokens, mean over the layers


def default_strategy(tower: Tower, *, has_text: bool, replaces_block: bool) -> Strategy:
    """What a tower is reduced by where nobody says: ToMe, of which a tiny CLIP's studies see no
    loss, to `DEFAULT_KEEP` of the tokens, or as near as it comes.

    Where ToMe refuses, or may not replace a block's forward: ELIP, if a CLS token or the model's
    own text can score, or a random keep.
    """
    tome = ToMe()
    if replaces_block and tome.refuses(tower) is None:
        least = kept_share(tome.at_strength(tower.size, 1.0), tower.size)
        return tome.at_keep(tower, max(DEFAULT_KEEP, least))
    return ELIP() if tower.has_cls or has_text else RandomPruning()
