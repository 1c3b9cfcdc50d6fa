"""Tasks without labels: how much a reduction changes the features of images.

cosine      cosine of the reduced and the dense feature of an image
neighbours  share of an image's ten nearest neighbours, by dense features among the same images,
            that are its ten nearest by reduced features too
own         1 minus the loss that a function of the user returns for each image
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from elip_models.analysis.feature_measures import cosine, neighbours
from elip_models.analysis.model_features import Function
from elip_models.calibration.images import ImageTask
from elip_models.calibration.task import Measure, Part, ratio
from elip_models.validation import shortened

Loss = Callable[[Tensor, Tensor], Tensor]
"""A function of dense and reduced features, (n, D), that returns what each image loses, (n,)."""


class FeatureTask(ImageTask):
    """A task that compares the features of the reduced model with those of the dense one.

    Attributes:
        features: the function of a model and images that returns their features.
    """

    def __init__(
        self, images: Tensor | Sequence[Tensor], *, features: Function, batch_size: int = 8
    ) -> None:
        super().__init__(images, batch_size=batch_size)
        self.features = features

    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return self.features(model, pixels)

    def measured(self, chosen_on: Part, held_back: Part | None = None) -> dict[str, Measure]:
        part = held_back or chosen_on
        values = self.agreement(part.dense["features"], part.outputs["features"]).double()
        rows = np.stack([values.numpy(), np.ones(len(values))], axis=1)
        return {self.measures[0]: Measure(rows, ratio)}

    def agreement(self, dense: Tensor, reduced: Tensor) -> Tensor:
        """Return (n,) how much of each image's feature is kept: 1 if it does not change."""
        raise NotImplementedError


class Cosine(FeatureTask):
    """Cosine of the reduced and the dense feature."""

    name: ClassVar[str] = "cosine"
    measures = ("cosine",)

    def agreement(self, dense: Tensor, reduced: Tensor) -> Tensor:
        return torch.where((dense == reduced).all(1), 1.0, cosine(dense, reduced))


class Neighbours(FeatureTask):
    """Share of the ten nearest neighbours that stay."""

    name: ClassVar[str] = "neighbours"
    measures = ("neighbours",)

    def agreement(self, dense: Tensor, reduced: Tensor) -> Tensor:
        return neighbours(dense, reduced)


class OwnLoss(FeatureTask):
    """A function of the user: 1 minus the loss that it returns for each image."""

    name: ClassVar[str] = "own"

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        loss: Loss,
        features: Function,
        batch_size: int = 8,
    ) -> None:
        super().__init__(images, features=features, batch_size=batch_size)
        self.loss = loss
        self.measures = (f"1 - {getattr(loss, '__name__', 'loss')}",)

    def agreement(self, dense: Tensor, reduced: Tensor) -> Tensor:
        losses = self.loss(dense, reduced)
        if not isinstance(losses, Tensor) or losses.shape != (len(dense),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"task: expected a function that returns a tensor ({len(dense)},), the loss of "
                f"each image, got {shortened(got)}"
            )
        if not losses.isfinite().all():
            raise ValueError(
                f"task: expected a function that returns finite losses, got a sum of "
                f"{losses.sum().item()}; correct the function"
            )
        return 1 - losses.double()
