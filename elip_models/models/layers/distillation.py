"""Momentum distillation in fine-tuning: whether, and what the momentum encoders begin as."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from elip_models.models.distilled_model import MomentumConfig

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(MomentumConfig):
    """Comes behind the pre-training config among the bases of a config.

    distill: what the momentum encoders answer is a target too, of weight alpha.
    """

    distill: bool = True

    @property
    def full_alpha(self) -> float:
        return self.alpha if self.distill else 0.0


def encoders_from_pretraining(
    weights: Weights, begin: Callable[[Weights], Weights], *, distill: bool = True
) -> Weights:
    """Begin the encoders, and their momentum copies as pre-training left those, or as the encoders
    where there are none.

    Args:
        weights: by our names of pre-training.
        begin: weights of pre-training's encoders -> those of the model's, by names inside them.
        distill: the model has momentum copies.

    Returns:
        Weights by the model's names.
    """
    online = _under("encoders.", weights)
    begun = {f"encoders.{name}": weight for name, weight in begin(online).items()}
    if not distill:
        return begun
    copies = begin(online | _under("encoders_m.", weights))
    return begun | {f"encoders_m.{name}": weight for name, weight in copies.items()}


def _under(prefix: str, weights: Weights) -> Weights:
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
