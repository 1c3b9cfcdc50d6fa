"""The strategies that select image tokens for a language model, one file each."""

from elip_models.vlm.strategies.base import LanguageStrategy
from elip_models.vlm.strategies.cdpruner import CDPruner
from elip_models.vlm.strategies.controls import Pool, RandomTokens, Stride
from elip_models.vlm.strategies.dedup import Dedup
from elip_models.vlm.strategies.diverse import Diverse
from elip_models.vlm.strategies.evs import EVS
from elip_models.vlm.strategies.layer_strategy import FastV, Pyramid
from elip_models.vlm.strategies.visionzip import VisionZip

LANGUAGE_STRATEGIES: dict[str, type[LanguageStrategy]] = {
    strategy.name: strategy
    for strategy in (
        Diverse,
        CDPruner,
        VisionZip,
        EVS,
        Dedup,
        Pool,
        RandomTokens,
        Stride,
        FastV,
        Pyramid,
    )
}
"""The strategies of a language model by name; the first is the default. `STRATEGIES` has others."""
