"""The methods that select image tokens for a language model, one file each."""

from elip_models.vlm.methods.base import Method
from elip_models.vlm.methods.controls import Pool, Random, Stride
from elip_models.vlm.methods.diverse import Diverse

METHODS: dict[str, type[Method]] = {each.name: each for each in (Diverse, Pool, Random, Stride)}
"""The methods by name; the first is the default."""
