"""A linear probe of image features: softmax regression of standardised features.

loss = mean cross-entropy + sum(W^2) / (2 C n)
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

INVERSE_PENALTY = 0.01
"""C, as scikit-learn names it."""


class LinearProbe(NamedTuple):
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

    def logits(self, features: Tensor) -> Tensor:
        """Return (n, C) fp64 of features (n, D)."""
        scaled = (features.double() - self.mean) / self.deviation
        return F.linear(scaled, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """Return (n,) int64 the most likely class of features (n, D)."""
        return self.logits(features).argmax(1)

    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return (n,) ones where the most likely class is that of `labels`, else zeros."""
        return (self.predict(features) == labels).double()
