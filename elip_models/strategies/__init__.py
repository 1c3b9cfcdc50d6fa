"""The built-in strategies by name, and the default one.

A strategy is frozen data, and an argument of `encode_image` and `reduce_`: an instance such as
`ToMe(r=13)`, or a line of text such as 'tome:r=13'. `STRATEGIES` is the one table of them: options,
calibration, commands, tests and pages are derived from it and from the attributes of the classes.
"""

from elip_models.strategies.baselines import TRIPS, PatchDropout, RandomPruning
from elip_models.strategies.dense import Dense
from elip_models.strategies.elip import ELIP
from elip_models.strategies.evit import EViT
from elip_models.strategies.flops import DEFAULT_KEEP, kept_share
from elip_models.strategies.guided_tome import GuidedToMe
from elip_models.strategies.resize import ImageResize
from elip_models.strategies.resize_merge import ResizeMerge
from elip_models.strategies.strategy import Strategy
from elip_models.strategies.token_merging import TokenMerging
from elip_models.strategies.tome import ToMe
from elip_models.towers import Tower
from elip_models.user_warnings import warn_once

__all__ = [
    "ELIP",
    "STRATEGIES",
    "TRIPS",
    "Dense",
    "EViT",
    "GuidedToMe",
    "ImageResize",
    "PatchDropout",
    "RandomPruning",
    "ResizeMerge",
    "ToMe",
    "TokenMerging",
]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        ResizeMerge,
        TokenMerging,
        ToMe,
        GuidedToMe,
        ImageResize,
        EViT,
        ELIP,
        TRIPS,
        RandomPruning,
        PatchDropout,
    )
}
"""In the order of their results on photographs, which is the order that `calibrate` tries."""
DEFAULT = TokenMerging


def default_strategy(tower: Tower, *, has_text: bool, may_replace: bool) -> Strategy:
    """Return the strategy for a tower if the caller names none; warn once if not `DEFAULT`.

    `DEFAULT` is set to `DEFAULT_KEEP` of the tokens or as near as it comes. If it may not replace
    the forward methods of the blocks (`may_replace`), the strategy is ELIP; or random pruning, if
    neither a CLS token nor a text can score.
    """
    default = DEFAULT()
    if may_replace:
        least = kept_share(default.at_strength(tower.size, 1.0), tower.size)
        return default.at_keep(tower, max(DEFAULT_KEEP, least))
    chosen = ELIP() if tower.has_cls or has_text else RandomPruning()
    warn_once(
        f"using {chosen.name!r} in place of {default.name!r}, the default strategy, on this "
        f"{type(tower.model).__name__}: the forward method of a block was replaced, which "
        f"{default.name!r} would bypass. Pass strategy={chosen.name!r} to avoid this warning",
        UserWarning,
        stacklevel=8,
    )
    return chosen
