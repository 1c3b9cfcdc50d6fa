"""The strategies that select image tokens for a language model, one file each."""

from elip_models.vlm.strategies.base import ImageTokenStrategy
from elip_models.vlm.strategies.cdpruner import CDPruner
from elip_models.vlm.strategies.controls import Pool, Random, Stride
from elip_models.vlm.strategies.diverse import Diverse

IMAGE_TOKEN_STRATEGIES: dict[str, type[ImageTokenStrategy]] = {
    each.name: each for each in (Diverse, CDPruner, Pool, Random, Stride)
}
"""The strategies by name; the first is the default."""
