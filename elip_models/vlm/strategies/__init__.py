"""The strategies that select image tokens for a language model, one file each."""

from elip_models.vlm.strategies.base import ImageTokenStrategy
from elip_models.vlm.strategies.cdpruner import CDPruner
from elip_models.vlm.strategies.controls import Pool, Random, Stride
from elip_models.vlm.strategies.diverse import Diverse
from elip_models.vlm.strategies.evs import EVS
from elip_models.vlm.strategies.inside import FastV, LayerStrategy, Pyramid
from elip_models.vlm.strategies.visionzip import VisionZip

IMAGE_TOKEN_STRATEGIES: dict[str, type[ImageTokenStrategy]] = {
    each.name: each for each in (Diverse, CDPruner, VisionZip, EVS, Pool, Random, Stride)
}
"""The strategies before the language model by name; the first is the default."""
LAYER_STRATEGIES: dict[str, type[LayerStrategy]] = {each.name: each for each in (FastV, Pyramid)}
"""The strategies inside the language model by name."""
KINDS: dict[str, type[ImageTokenStrategy] | type[LayerStrategy]] = (
    IMAGE_TOKEN_STRATEGIES | LAYER_STRATEGIES
)
"""All of them; the first is the default."""
