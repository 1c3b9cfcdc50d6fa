"""A linear probe of image features, and what it loses if it reads those of a reduced model.

    probe = softmax regression of standardised features: mean cross-entropy + sum(W^2) / (2 C n)

The probe is fitted on dense features alone: reduced features that keep what it reads lose nothing.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_models.validation import shortened

INVERSE_PENALTY = 0.01
"""C, as scikit-learn names it."""
FOLDS = 5


class Probe(NamedTuple):
    """Softmax regression of features (n, D) in C classes.

    Attributes:
        mean, deviation: (D,) of the features that it was fitted on.
        weight: (C, D). bias: (C,).
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls, features: Tensor, labels: Tensor, *, inverse_penalty: float = INVERSE_PENALTY
    ) -> Self:
        """Return the probe with the least loss on features (n, D) of classes (n,), from 0."""
        features = features.double()
        mean, deviation = features.mean(0), features.std(0).clamp(min=1e-12)
        scaled = (features - mean) / deviation
        classes = int(labels.max()) + 1
        weight = scaled.new_zeros(classes, scaled.shape[1], requires_grad=True)
        bias = scaled.new_zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(scaled, weight, bias), labels)
            value = value + weight.square().sum() / (2 * inverse_penalty * len(labels))
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        return cls(mean, deviation, weight.detach(), bias.detach())

    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return (n,) ones where the most likely class is that of `labels`, else zeros."""
        scaled = (features.double() - self.mean) / self.deviation
        return (F.linear(scaled, self.weight, self.bias).argmax(1) == labels).double()


class ProbeLoss:
    """What probes of dense features lose on reduced ones, image by image, cross-validated.

    Each image is classified by a probe that was fitted on the images of the other folds.

    Attributes:
        accuracy: of the dense features, cross-validated; None before the first call.
        most_frequent: share of the images that are of the most frequent class.
    """

    accuracy: float | None = None

    def __init__(self, labels: Tensor, *, seed: int = 0) -> None:
        """Draw the folds.

        Args:
            labels: (n,) the class of each image, integers from 0, on any device.
            seed: of the draw.

        Raises:
            TypeError, ValueError: labels of another form, of a single class, or a class with fewer
                images than folds.
        """
        if not isinstance(labels, Tensor) or labels.dtype != torch.long or labels.dim() != 1:
            got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
            raise TypeError(f"labels: expected an int64 tensor (n,), got {shortened(got)}")
        if len(labels.unique()) < 2 or labels.min() < 0:
            raise ValueError(
                "labels: expected at least two classes with numbers from 0, got "
                f"{shortened(labels.unique().tolist())}"
            )
        self.labels = labels.cpu()
        numbers, counts = self.labels.unique(return_counts=True)
        if counts.min() < FOLDS:
            raise ValueError(
                f"labels: expected at least {FOLDS} images of each class, one a fold, got "
                f"{counts.min()} of class {numbers[counts.argmin()]}; add images, or leave it out"
            )
        self.most_frequent = counts.max().item() / len(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        order = order[self.labels[order].argsort(stable=True)]  # each fold has all classes
        self.folds = [order[i::FOLDS] for i in range(FOLDS)]
        self._probes: list[Probe] = []
        self._dense = torch.zeros(0)

    def __call__(self, dense: Tensor, reduced: Tensor) -> Tensor:
        """Return (n,) the loss: right with the dense feature (0 or 1), less right with the other.

        Args:
            dense: (n, D); the probes are fitted on those of the first call.
            reduced: (n, D).

        Raises:
            ValueError: the probes of dense features are not better than the most frequent class.
        """
        if not self._probes:
            self._probes = [self._fit(dense, fold) for fold in self.folds]
            self._dense = self.correct(dense)
            self.accuracy = self._dense.mean().item()
        if self.accuracy <= self.most_frequent:
            raise ValueError(
                "labels: expected classes that a linear probe tells apart by dense features, got a "
                f"top-1 of {self.accuracy:.3f}, with {self.most_frequent:.3f} of the images in the "
                "most frequent class; a probe that is wrong has nothing to lose: use more images, "
                "other labels or another model"
            )
        return self._dense - self.correct(reduced)

    def correct(self, features: Tensor) -> Tensor:
        """Return (n,) ones where the probe of the other folds classifies the feature rightly."""
        correct = torch.empty(len(features), dtype=torch.double)
        for probe, fold in zip(self._probes, self.folds, strict=True):
            correct[fold] = probe.correct(features[fold], self.labels[fold])
        return correct

    def _fit(self, dense: Tensor, fold: Tensor) -> Probe:
        """Return the probe of all other folds."""
        others = torch.ones(len(dense), dtype=torch.bool).index_fill(0, fold, False)
        return Probe.fit(dense[others], self.labels[others])
